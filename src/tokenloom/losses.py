"""The loss of an update or of any micro-batch of it, its metrics, and the coefficient view.

loss = -sum(scale * weights * objective) + sum over terms k of coef_k * sum(scale_k * weights_k * term_k)

Only live tokens count: what the plan left without effect in every term needs no signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.composition import Bound, Term
from tokenloom.context import Context
from tokenloom.masked import masked_sum, where_mask
from tokenloom.plan import Metrics, Update
from tokenloom.planning import expect, seeded
from tokenloom.schedule import resolve
from tokenloom.signals import Signals

if TYPE_CHECKING:
    from tokenloom.algorithm import Algorithm


def refresh(algorithm: Algorithm, update: Update, signals: Signals, generator: torch.Generator | None) -> Update:
    """See `Algorithm.refresh`."""
    if not update.whole:
        raise ValueError("refresh sees rows together: pass the whole update, and slice what it gives")
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        ctx = _context(algorithm, update, signals.detach(), update.tensors["mask"])
        ctx.put("generator", generator or seeded(update.constants["step"], update.rows.device))
        for key, bound in algorithm.bound_parts():
            # In the order of the loss, so that what reads advantages sees them after the credit parts.
            if not bound.late or bound.part.stage not in ("credit", "weight"):
                continue
            if bound.coupled or bound.part.stage == "credit":
                value = expect(bound, ctx.call(bound), ctx.mask)
                if bound.coupled:
                    found[f"late/{key}"] = value
                if bound.part.stage == "credit":
                    ctx.put("advantages", value)
    return replace(update, tensors=update.tensors | found)


def loss(algorithm: Algorithm, signals: Signals, update: Update) -> tuple[Tensor, Metrics]:
    """See `Algorithm.loss`."""
    if algorithm.needs_refresh and not any(k.startswith("late/") for k in update.tensors):
        if not update.whole:
            late = [b.part.name for b in algorithm.late_weights() if b.coupled]
            raise ValueError(
                f"{late} must see the whole update: call algorithm.refresh(update, signals) before slicing it"
            )
        update = refresh(algorithm, update, signals, None)
    ctx = _context(algorithm, update, signals, update.tensors["mask"] & update.live)
    mask, tensors = ctx.mask, update.tensors
    for i, bound in enumerate(algorithm.credit):
        if bound.late:
            ctx.put("advantages", _late(f"credit/{i}/{bound.part.name}", bound, ctx, tensors))
    weights = tensors["weights"]
    for i, bound in enumerate(algorithm.weight):
        if bound.late:
            weights = weights * _late(f"weight/{i}/{bound.part.name}", bound, ctx, tensors)
    scale = where_mask(tensors["scale"] * weights, mask)
    total = -(scale * where_mask(_objective(algorithm, ctx), mask)).sum()
    metrics = _measure(algorithm, ctx, scale)
    metrics.add("loss/policy", total.detach())
    for i, term in enumerate(algorithm.terms):
        value = expect(term.part, ctx.call(term.part), mask)
        part_scale = tensors[f"scale/{i}"]
        for j, bound in enumerate(term.weight):
            if bound.late:
                part_scale = part_scale * _late(f"terms/{i}/weight/{j}/{bound.part.name}", bound, ctx, tensors)
        contribution = (where_mask(part_scale, mask) * where_mask(value, mask)).sum()
        total = total + _coef(term, update) * contribution
        metrics.add(f"loss/{term.part.part.name}", contribution.detach())
        metrics.add(f"{term.part.part.name}/mean", masked_sum(value.detach(), mask), mask.sum())
    metrics.add("loss", total.detach())
    return total, metrics


def corpus_loss(
    algorithm: Algorithm,
    signals: Signals,
    rollouts: Rollouts,
    rows: Tensor | None,
    step: int,
    total_steps: int | None,
) -> tuple[Tensor, Metrics]:
    """See `Algorithm.corpus_loss`."""
    at = torch.arange(len(rollouts), device=rollouts.mask.device) if rows is None else rows
    current = {n: v for n, v in signals.named().items() if n in algorithm.corpus_needs}
    if missing := sorted(algorithm.corpus_needs - current.keys()):
        raise ValueError(f"the terms over a corpus need the signals {missing}; got {sorted(signals.named())}")
    mask = rollouts.mask[at]
    if current["logprobs"].shape != mask.shape:
        raise ValueError(f"signals are {tuple(current['logprobs'].shape)}, the corpus rows {tuple(mask.shape)}")
    held = {n: getattr(rollouts, n) for n in ("tokens", "lengths", "group_ids")}
    when = {"step": step, "total_steps": total_steps}
    whole = Context(held | when, rollouts.mask)
    here = Context({n: v[at] for n, v in held.items()} | when | current, mask)
    metrics = Metrics()
    total = torch.zeros((), dtype=current["logprobs"].dtype, device=mask.device)
    for term in algorithm.corpus:
        name, weights = term.part.part.name, rollouts.mask.to(total.dtype)
        with torch.no_grad():
            whole.put("weights", weights)
            for bound in term.weight:
                weights = where_mask(weights * expect(bound, whole.call(bound), rollouts.mask), rollouts.mask)
                whole.put("weights", weights)
            aggregate = term.aggregate or algorithm.aggregate
            scale = where_mask(expect(aggregate, whole.call(aggregate), rollouts.mask) * weights, rollouts.mask)[at]
        here.put("weights", weights[at])
        value = where_mask(expect(term.part, here.call(term.part), mask), mask)
        contribution = (scale * value).sum()
        total = total + float(resolve(term.coef, step, total_steps)) * contribution
        metrics.add(f"loss/corpus/{name}", contribution.detach())
        metrics.add(f"corpus/{name}/mean", value.detach().sum(), mask.sum())
    metrics.add("loss", total.detach())
    return total, metrics


def coefficients(
    algorithm: Algorithm, rollouts: Rollouts, signals: Signals, **plan_arguments: Any
) -> dict[str, Tensor]:
    """See `Algorithm.coefficients`."""
    plan = algorithm.plan(rollouts, signals, one_update=True, **plan_arguments)
    present = {"values" if n == "old_values" else n: v for n, v in signals.named().items() if n == "old_values"}
    present |= signals.named()
    leaves = {n: present[n].detach().clone().requires_grad_() for n in algorithm.loss_needs if n in present}
    if "logprobs" not in leaves:
        raise ValueError("coefficients need signals.logprobs")
    total = sum(
        (loss(algorithm, signals.replace(**leaves).rows(u.rows), u)[0] for u in plan.updates),
        torch.zeros((), device=rollouts.mask.device),
    )
    if not total.requires_grad:
        return {n: torch.zeros_like(v) for n, v in leaves.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else -g for (n, leaf), g in zip(leaves.items(), grads, strict=True)}


def _context(algorithm: Algorithm, update: Update, signals: Signals, mask: Tensor) -> Context:
    current = {n: v for n, v in signals.named().items() if n in algorithm.loss_needs}
    if "logprobs" not in current:
        raise ValueError(f"the loss needs the signals {sorted(algorithm.loss_needs)}; got {sorted(signals.named())}")
    if current["logprobs"].shape != mask.shape:
        raise ValueError(
            f"signals are {tuple(current['logprobs'].shape)}, the update is {tuple(mask.shape)}: pass the same rows"
        )
    held = {k: v for k, v in update.tensors.items() if k != "mask" and "/" not in k}
    ctx = Context(held | update.constants | current, mask)
    if ctx.get("old_logprobs") is None:
        ctx.put("old_logprobs", ctx.get("logprobs").detach())
    ctx.put("log_ratio", ctx.call(algorithm.log_ratio))
    limits = ctx.call(algorithm.bounds)
    if not isinstance(limits, tuple) or len(limits) != 3:
        raise ValueError(f"part {algorithm.bounds.part.name!r} must give (lo, hi, cap), got {limits!r}")
    for name, value in zip(("lo", "hi", "cap"), limits, strict=True):
        ctx.put(name, value)
    return ctx


def _objective(algorithm: Algorithm, ctx: Context) -> Tensor:
    """What is maximized, [B, T]: the surrogate, or its two branches mixed by `blend`."""
    first = expect(algorithm.surrogate, ctx.call(algorithm.surrogate), ctx.mask)
    if algorithm.blend is None:
        return first
    bound = algorithm.blend.surrogate or algorithm.surrogate
    own = ctx.values["advantages"]
    ctx.put("advantages", ctx.get("blend_advantages"))
    second = expect(bound, ctx.call(bound), ctx.mask)
    ctx.put("advantages", own)
    share = ctx.get("blend")
    mixed: Tensor = share * where_mask(first, ctx.mask) + (1 - share) * where_mask(second, ctx.mask)
    return mixed


def _late(key: str, bound: Bound, ctx: Context, tensors: Mapping[str, Tensor]) -> Tensor:
    if bound.coupled:
        return tensors[f"late/{key}"]
    with torch.no_grad():
        return expect(bound, ctx.call(bound), ctx.mask)


def _measure(algorithm: Algorithm, ctx: Context, scale: Tensor) -> Metrics:
    metrics = Metrics()
    mask = ctx.mask
    with torch.no_grad():
        count = mask.sum()
        log_ratio = where_mask(ctx.get("log_ratio"), mask)
        metrics.add("ratio/mean", where_mask(ctx.get("ratio"), mask).sum(), count)
        metrics.add("ratio/abs_log", log_ratio.abs().sum(), count)
        metrics.add("kl/old", (log_ratio.exp() - 1 - log_ratio).sum(), count)
        acting = mask & (scale * ctx.get("advantages")).ne(0)
        metrics.add("weight/acting", acting.sum(), count)
        multiplier = ctx.multiplier(algorithm.surrogate)
        if multiplier is not None:
            metrics.add("surrogate/clipped", (acting & multiplier.expand(mask.shape).eq(0)).sum(), acting.sum())
    return metrics


def _coef(term: Term, update: Update) -> float:
    return float(resolve(term.coef, update.constants["step"], update.constants["total_steps"]))
