"""From a batch to a plan: reward, advantage, select, credit, weight, updates, blend, aggregate, in this order.

Everything here runs without gradient on the whole batch, gathered over ranks; `losses` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.composition import Bound
from tokenloom.context import Context
from tokenloom.masked import masked_mean, where_mask
from tokenloom.plan import GIVEN, Plan, Update
from tokenloom.signals import Signals
from tokenloom.vocabulary import CURRENT

if TYPE_CHECKING:
    from tokenloom.algorithm import Algorithm

CONSTANTS = ("step", "total_steps", "max_tokens")


def plan_context(
    rollouts: Rollouts, signals: Signals, step: int, total: int | None, generator: torch.Generator | None
) -> Context:
    """Every name that exists before the first stage."""
    names = ("tokens", "lengths", "group_ids", "truncated", "answers", "prompts", "sampler_logprobs",
             "policy_version")  # fmt: skip
    values: dict[str, Any] = {n: getattr(rollouts, n) for n in names} | rollouts.extras
    outcomes = rollouts.rewards
    if outcomes is not None and not outcomes.is_floating_point():
        outcomes = outcomes.to(torch.float32 if signals.logprobs is None else signals.logprobs.dtype)
    values |= {"outcomes": outcomes, "max_tokens": rollouts.sampling.max_tokens or None, "step": step}
    values |= {"reward_components": rollouts.reward_components or None}
    values |= {"total_steps": total, "generator": generator or seeded(step, rollouts.mask.device)}
    values |= signals.detach().named()
    if values.get("old_values") is not None:
        values["values"] = values["old_values"]
    ctx = Context(values, rollouts.mask)
    if outcomes is not None:
        ctx.put_rewards(outcomes)
    return ctx


def rows_that_may_enter(
    algorithm: Algorithm, rollouts: Rollouts, state: Mapping[str, Any] | None, step: int, total: int | None
) -> Tensor:
    """[B] bool from the refilling select parts; see `Algorithm.keep`."""
    ctx = plan_context(rollouts, Signals(), step, total, None)
    kept = torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.mask.device)
    for i, bound in enumerate(algorithm.select):
        if bound.part.refill:
            result = ctx.call(bound, (state or {}).get(f"select/{i}/{bound.part.name}"))
            result = result[0] if "state" in bound.part.inputs else result
            kept &= _rows_kept(bound, _named(result, "keep"), kept)
    return kept


class Planner:
    """One plan in the making: the context, the state that parts hand on and what they measured."""

    def __init__(self, algorithm: Algorithm, ctx: Context, state: Mapping[str, Any]) -> None:
        self.algorithm, self.ctx = algorithm, ctx
        self.state = dict(state)
        self.metrics: dict[str, float] = {}

    @torch.no_grad()
    def plan(self, *, one_update: bool) -> Plan:
        """Run the stages; see `Algorithm.plan`."""
        algorithm, mask = self.algorithm, self.ctx.mask
        for i, bound in enumerate(algorithm.reward):
            self.ctx.put_rewards(self.run(f"reward/{i}/{bound.part.name}", bound, "rewards")["rewards"])
        for name, value in self.run("advantage", algorithm.advantage, "advantages").items():
            self.ctx.put(name, expect(algorithm.advantage, value, mask))
        if algorithm.blend is not None:
            second = algorithm.blend.advantage
            value = self.run("blend/advantage", second, "advantages")["advantages"]
            self.ctx.put("blend_advantages", expect(second, value, mask))
        keep = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
        for i, bound in enumerate(algorithm.select):
            keep &= _rows_kept(bound, self.run(f"select/{i}/{bound.part.name}", bound, "keep"), keep)
        self._restrict(keep)
        for i, bound in enumerate(algorithm.credit):
            if not bound.late:
                value = self.run(f"credit/{i}/{bound.part.name}", bound, "advantages")["advantages"]
                self.ctx.put("advantages", expect(bound, value, mask))
        if algorithm.blend is not None:
            self.ctx.put("blend", self._blend(algorithm.blend.part))
        policy_weights = self._weights("weight", algorithm.weight)
        self.ctx.put("weights", policy_weights)
        shares = self._shares(keep, one_update)
        terms = [self._weights(f"terms/{i}/weight", t.weight) for i, t in enumerate(algorithm.terms)]
        self.ctx.put("weights", policy_weights)
        made = tuple(self._update(rows, tokens, terms) for rows, tokens in shares if len(rows))
        values = dict(self.ctx.values) | {"keep": keep, "scale": _scatter(made, mask)}
        self._measure(keep, made)
        for bound in algorithm.metrics:
            self.metrics |= {f"{bound.part.name}/{k}": float(v) for k, v in _numbers(bound, self.ctx).items()}
        return Plan(made, values, self.state, self.metrics)

    def run(self, key: str, bound: Bound, gives: str) -> dict[str, Any]:
        """Call a part; what it gives by name, its state and metrics taken off."""
        result = self.ctx.call(bound, self.state.get(key))
        if "state" in bound.part.inputs:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise ValueError(f"part {bound.part.name!r} takes 'state' and must give (value, state)")
            result, self.state[key] = result
        named = _named(result, gives)
        if gives not in named:
            raise ValueError(f"part {bound.part.name!r} must give {gives!r}, got {sorted(named)}")
        for name, value in named.pop("metrics", {}).items():
            self.metrics[f"{bound.part.name}/{name}"] = float(value)
        return named

    def _restrict(self, keep: Tensor) -> None:
        values = {k: v for k, v in self.ctx.values.items() if k != "mask"}
        self.ctx = Context(values | {"keep": keep}, self.ctx.mask & keep[:, None])

    def _blend(self, bound: Bound) -> Tensor:
        """The first branch's share of each token, [B, T], from a part that gives [B] or [B, T]."""
        value, mask = self.run("blend", bound, "blend")["blend"], self.ctx.mask
        if isinstance(value, Tensor) and value.shape == mask.shape[:1]:
            value = value[:, None].expand(mask.shape)
        return where_mask(expect(bound, value, mask), mask)

    def _weights(self, key: str, bounds: tuple[Bound, ...]) -> Tensor:
        mask = self.ctx.mask
        weights = mask.to(self.ctx.values["advantages"].dtype)
        for i, bound in enumerate(bounds):
            if not bound.late:
                self.ctx.put("weights", weights)
                value = self.run(f"{key}/{i}/{bound.part.name}", bound, "weights")["weights"]
                weights = where_mask(weights * expect(bound, value, mask), mask)
        return weights

    def _shares(self, keep: Tensor, one_update: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Rows [n] of each update and, when the updates part says so, which of their tokens [n, T] it trains."""
        if one_update:
            return [(keep.nonzero().reshape(-1), None)]
        named = self.run("updates", self.algorithm.updates, "rows")
        tokens = named.get("tokens") or [None] * len(named["rows"])
        return list(zip(named["rows"], tokens, strict=True))

    def _update(self, rows: Tensor, tokens: Tensor | None, term_weights: list[Tensor]) -> Update:
        algorithm, values = self.algorithm, self.ctx.values
        cut = {k: _cut(v, rows) for k, v in values.items()}
        local = Context({k: v for k, v in cut.items() if k != "mask"}, cut["mask"])
        mask = local.mask
        # Tokens of another pass still count in the normalizers: they are cut from the scales, not from the mask.
        share = mask if tokens is None else mask & tokens
        tensors: dict[str, Tensor] = {"mask": mask, "advantages": cut["advantages"], "weights": cut["weights"]}
        scale = expect(algorithm.aggregate, local.call(algorithm.aggregate), mask)
        tensors["scale"] = where_mask(scale, share)
        acting = cut["advantages"].ne(0)
        if algorithm.blend is not None:
            tensors |= {n: cut[n] for n in ("blend", "blend_advantages")}
            acting = (cut["blend"] * cut["advantages"]).ne(0) | ((1 - cut["blend"]) * cut["blend_advantages"]).ne(0)
        if any(b.late for b in algorithm.credit):
            acting = torch.ones_like(acting)
        live = (tensors["scale"] * tensors["weights"]).ne(0) & acting
        for i, (term, weights) in enumerate(zip(algorithm.terms, term_weights, strict=True)):
            local.put("weights", weights[rows])
            aggregate = term.aggregate or algorithm.aggregate
            scale = expect(aggregate, local.call(aggregate), mask)
            tensors[f"scale/{i}"] = where_mask(scale * weights[rows], share)
            live |= tensors[f"scale/{i}"].ne(0)
        for bound in algorithm.late_parts():
            for name in bound.part.inputs:
                if name in algorithm.loss_needs or name in CURRENT or name in _SETTLED_IN_THE_LOSS:
                    continue
                if isinstance(cut.get(name), Tensor):
                    tensors.setdefault(name, cut[name])
        if "old_logprobs" in cut:
            tensors.setdefault("old_logprobs", cut["old_logprobs"])
        tensors |= {GIVEN + name: cut[name] for name in algorithm.given}
        if algorithm.needs_whole_rows:
            live = mask & live.any(-1, keepdim=True)
        return Update(rows, tensors, {k: values.get(k) for k in CONSTANTS}, live & mask)

    def _measure(self, keep: Tensor, made: tuple[Update, ...]) -> None:
        rows, tokens = sum(len(u) for u in made), sum(int(u.tensors["mask"].sum()) for u in made)
        self.metrics["kept"] = float(keep.float().mean()) if len(keep) else 0.0
        self.metrics["live"] = sum(len(u.live_rows) for u in made) / max(1, rows)
        self.metrics["live_tokens"] = sum(int(u.live.sum()) for u in made) / max(1, tokens)
        self.metrics["advantage/abs"] = float(masked_mean(self.ctx.values["advantages"].abs(), self.ctx.mask))


_SETTLED_IN_THE_LOSS = ("lo", "hi", "cap", "generator", *CONSTANTS)


def seeded(step: int, device: torch.device) -> torch.Generator:
    """What parts draw from when nobody passes a generator."""
    return torch.Generator(device=device).manual_seed(step)


def expect(bound: Bound, value: Any, mask: Tensor) -> Tensor:
    """`value` if it is [B, T].

    Raises:
        ValueError: naming the part and what it gave.
    """
    if not isinstance(value, Tensor) or value.shape != mask.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"part {bound.part.name!r} must give [B, T] = {tuple(mask.shape)}, got {shape}")
    return value


def _rows_kept(bound: Bound, named: Mapping[str, Any], like: Tensor) -> Tensor:
    keep = named.get("keep")
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != like.shape:
        got = f"{tuple(keep.shape)} {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"part {bound.part.name!r} must give bool [B] = {tuple(like.shape)}, got {got}")
    return keep


def _numbers(bound: Bound, ctx: Context) -> Mapping[str, Any]:
    found = ctx.call(bound)
    if not isinstance(found, Mapping):
        raise ValueError(f"part {bound.part.name!r} must give numbers by name, got {type(found).__name__}")
    return found


def _named(result: Any, gives: str) -> dict[str, Any]:
    return dict(result) if isinstance(result, Mapping) else {gives: result}


def _cut(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value[rows]
    return tuple(value[i] for i in rows.tolist()) if isinstance(value, tuple) else value


def _scatter(updates: tuple[Update, ...], mask: Tensor) -> Tensor:
    """The scale of each token in the updates that train it, [B, T]; the largest where several do."""
    dtype = updates[0].tensors["scale"].dtype if updates else torch.float32
    out = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    for update in updates:
        out[update.rows] = torch.maximum(out[update.rows], update.tensors["scale"])
    return out
