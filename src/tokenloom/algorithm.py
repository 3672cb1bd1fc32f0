"""`Algorithm`: a composition of parts that plans a batch and states its loss.

loss = -sum(scale * weights * objective) + sum over terms k of coef_k * sum(scale_k * weights_k * term_k)

`plan` sees the whole batch, gathered over ranks, without gradient; `loss` sees any micro-batch of an
update. Whatever couples rows is settled in the plan, or in `refresh` when it must read the policy
being trained, so every split into micro-batches gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.catalog import check_parameters, get_preset, suggest
from tokenloom.composition import Bound, PartSpec, Term, parse, parse_many, parse_term, parse_terms
from tokenloom.context import Context
from tokenloom.masked import masked_mean, masked_sum, where_mask
from tokenloom.plan import Metrics, Plan, Update
from tokenloom.schedule import resolve
from tokenloom.signals import CHUNK_SIGNALS, SIGNAL_NAMES, Signals
from tokenloom.vocabulary import CURRENT

_SINGLE = ("advantage", "aggregate", "log_ratio", "bounds", "surrogate", "updates")
_LISTS = ("sampling", "reward", "select", "credit", "weight")
_CONSTANTS = ("step", "total_steps", "max_tokens")
_STATEFUL = ("reward", "advantage", "select", "credit", "weight", "updates")


@dataclass(frozen=True)
class Algorithm:
    """A composition of bound parts, one per stage or a list of them.

    Build one with `Algorithm.compose(...)`, a preset (`Algorithm.from_recipe("grpo")`), or by changing
    another (`algorithm.override(bounds={"high": 0.28})`). `preset` names where it came from.
    """

    advantage: Bound
    surrogate: Bound
    aggregate: Bound
    log_ratio: Bound
    bounds: Bound
    updates: Bound
    sampling: tuple[Bound, ...] = ()
    reward: tuple[Bound, ...] = ()
    select: tuple[Bound, ...] = ()
    credit: tuple[Bound, ...] = ()
    weight: tuple[Bound, ...] = ()
    terms: tuple[Term, ...] = ()
    preset: str = "custom"

    def __post_init__(self) -> None:
        self._check_stages()
        for bound in (self.surrogate, self.log_ratio, self.bounds, *(t.part for t in self.terms)):
            if bound.coupled:
                raise ValueError(
                    f"part {bound.part.name!r} has scope {bound.part.scope!r} and cannot stand in the loss, which is "
                    "computed on micro-batches; make what couples the rows a weight part (it may read the policy)"
                )
        for bound in (*self.credit, *self.weight, *(w for t in self.terms for w in t.weight)):
            if bound.late and "state" in bound.part.inputs:
                raise ValueError(f"part {bound.part.name!r} reads the policy being trained and cannot carry state")
        for bound in (*self.reward, self.advantage, *self.select, self.updates, *(a for a, _ in self._aggregates())):
            if bound.late:
                raise ValueError(
                    f"part {bound.part.name!r} reads {sorted(CURRENT & set(bound.part.inputs))}, which does not exist "
                    f"yet at stage {bound.part.stage!r}; read 'old_logprobs' instead"
                )
        for _, bound in self.bound_parts():
            if bound.part.inputs.get("returns") and "returns" not in self.advantage.part.gives:
                raise ValueError(
                    f"part {bound.part.name!r} needs 'returns', which the advantage part "
                    f"{self.advantage.part.name!r} does not give; use one with a critic, such as 'ppo-gae'"
                )
        for aggregate, weights in self._aggregates():
            if aggregate.params.get("count") == "weights" and any(w.late for w in weights):
                late = [w.part.name for w in weights if w.late]
                raise ValueError(f"count='weights' cannot see {late}, which read the policy being trained")

    def _check_stages(self) -> None:
        placed = [(b, _stage_of(key)) for key, b in self.bound_parts()]
        placed += [(t.aggregate, "aggregate") for t in self.terms if t.aggregate]
        for bound, stage in placed:
            name, inputs = bound.part.name, set(bound.part.inputs)
            if bound.part.stage != stage:
                raise ValueError(f"{name!r} is a part of stage {bound.part.stage!r} and cannot stand at {stage!r}")
            if "state" in inputs and stage not in _STATEFUL:
                raise ValueError(f"part {name!r} cannot carry state at stage {stage!r}; stages that do: {_STATEFUL}")
            if stage == "sampling" and (unknown := inputs - {"logits", "step", "total_steps"}):
                raise ValueError(f"part {name!r} reads {sorted(unknown)}, which is not there while sampling")

    @classmethod
    def compose(
        cls,
        *,
        advantage: PartSpec,
        surrogate: PartSpec = "ppo-clip",
        aggregate: PartSpec = "token-mean",
        log_ratio: PartSpec = "token-ratio",
        bounds: PartSpec = "clip",
        updates: PartSpec = "mini-batches",
        sampling: Any = (),
        reward: Any = (),
        select: Any = (),
        credit: Any = (),
        weight: Any = (),
        terms: Any = (),
        preset: str = "custom",
    ) -> Self:
        """Compose from names, recipe mappings or bound parts.

        Raises:
            ValueError: unknown parts or parameters, or parts that cannot stand together.
        """
        return cls(
            advantage=parse("advantage", advantage),
            surrogate=parse("surrogate", surrogate),
            aggregate=parse("aggregate", aggregate),
            log_ratio=parse("log_ratio", log_ratio),
            bounds=parse("bounds", bounds),
            updates=parse("updates", updates),
            sampling=parse_many("sampling", sampling, ()),
            reward=parse_many("reward", reward, ()),
            select=parse_many("select", select, ()),
            credit=parse_many("credit", credit, ()),
            weight=parse_many("weight", weight, ()),
            terms=parse_terms(terms, ()),
            preset=preset,
        )

    @classmethod
    def from_recipe(cls, spec: str | Mapping[str, Any]) -> Self:
        """Read the recipe's `algorithm`: a preset's name, or a mapping with `preset`, its parameters, and stages.

        Without `preset` the stages are composed from scratch.

        Raises:
            ValueError: naming the key, the value, what is allowed and the nearest known name.
        """
        if isinstance(spec, str):
            spec = {"preset": spec}
        if not isinstance(spec, Mapping):
            raise ValueError(f"algorithm: expected a preset's name or a mapping, got {spec!r}")
        stages = {k: v for k, v in spec.items() if k in (*_SINGLE, *_LISTS, "terms")}
        rest = {k: v for k, v in spec.items() if k not in stages and k != "preset"}
        if "preset" not in spec:
            if rest:
                known = ["preset", *_SINGLE, *_LISTS, "terms"]
                raise ValueError("; ".join(f"algorithm: unknown key {k!r}{suggest(k, known)}" for k in rest))
            if "advantage" not in stages:
                raise ValueError("algorithm: name a preset, or at least the stage 'advantage'")
            return cls.compose(**stages)
        found = get_preset(spec["preset"])
        for key in rest:
            if key not in found.parameters:
                known = [*found.parameters, *_SINGLE, *_LISTS, "terms"]
                raise ValueError(f"algorithm {found.slug!r}: unknown key {key!r}{suggest(key, known)}")
        made: Self = found.function(**check_parameters(f"algorithm {found.slug!r}", rest, found.parameters))
        return replace(made.override(**stages), preset=spec["preset"])

    def override(self, **stages: Any) -> Self:
        """A copy with some stages changed; see `composition.parse*` for the forms. Part parameters merge."""
        changes: dict[str, Any] = {}
        for name, spec in stages.items():
            current = getattr(self, name, None)
            if name in _SINGLE:
                changes[name] = parse(name, spec, current)  # type: ignore[arg-type]  # a Stage by the line above
            elif name in _LISTS:
                changes[name] = parse_many(name, spec, current or ())  # type: ignore[arg-type]
            elif name == "terms":
                changes[name] = parse_terms(spec, self.terms)
            else:
                raise ValueError(f"unknown stage {name!r}{suggest(name, (*_SINGLE, *_LISTS, 'terms'))}")
        return replace(self, **changes)

    def with_term(self, name: str, **spec: Any) -> Self:
        """A copy with one more term: `with_term("kl", coef=0.04, estimator="k3")`."""
        return replace(self, terms=(*self.terms, parse_term({"part": name, **spec})))

    # -- what it is made of -------------------------------------------------------------------------

    def bound_parts(self) -> Iterator[tuple[str, Bound]]:
        """Every part with a key that is unique in the composition, in stage order."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Bound):
                yield f.name, value
            elif f.name in _LISTS:
                yield from ((f"{f.name}/{i}/{b.part.name}", b) for i, b in enumerate(value))
        for i, term in enumerate(self.terms):
            yield f"terms/{i}/{term.part.part.name}", term.part
            yield from ((f"terms/{i}/weight/{j}/{w.part.name}", w) for j, w in enumerate(term.weight))

    def recipe(self) -> dict[str, Any]:
        """The composition spelled out, as a mapping that `from_recipe` reads back."""
        out: dict[str, Any] = {name: getattr(self, name).recipe() for name in _SINGLE}
        out |= {name: [b.recipe() for b in getattr(self, name)] for name in _LISTS if getattr(self, name)}
        return out | ({"terms": [t.recipe() for t in self.terms]} if self.terms else {})

    def describe(self) -> list[str]:
        """One line per part: stage, name, every hyperparameter, paper."""
        lines = []
        for name in ("sampling", "reward", "advantage", "select", "credit", "weight", "updates", "aggregate",
                     "log_ratio", "bounds", "surrogate"):  # fmt: skip
            value = getattr(self, name)
            lines += [f"{name:<10} {b}  [{b.part.paper}]" for b in (value if isinstance(value, tuple) else (value,))]
        return lines + [f"{'term':<10} {t}  [{t.part.part.paper}]" for t in self.terms]

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute without gradient before `plan`."""
        names: set[str] = set()
        for _, bound in self._plan_parts():
            names |= self._signals_of(bound) - CURRENT
        names = {"old_values" if n == "values" else n for n in names}
        for bound in self._late_parts():
            names |= {n for n in self._signals_of(bound) if n.startswith(("old_", "ref_"))}
        if self._one_update() and not any("old_logprobs" in b.part.inputs for _, b in self._plan_parts()):
            # With a single update the old policy is the policy at the forward of the loss itself.
            names -= {"old_logprobs"}
        return frozenset(names)

    @property
    def loss_needs(self) -> frozenset[str]:
        """Signals to compute with gradient for `loss`."""
        names = {"logprobs"}
        for bound in self._late_parts():
            names |= {n for n in self._signals_of(bound) if not n.startswith(("old_", "ref_"))}
        return frozenset(names - {"log_ratio", "ratio"})

    @property
    def refill(self) -> bool:
        """Whether a select part wants dropped groups replaced by newly sampled ones."""
        return any(b.part.refill for b in self.select)

    @property
    def needs_refresh(self) -> bool:
        """Whether parts couple rows and read the policy being trained, so that `refresh` must run per update."""
        return any(b.late and b.coupled for b in self._late_weights())

    def shape_logits(self, *, step: int = 0, total_steps: int | None = None) -> Callable[[Tensor], Tensor] | None:
        """The sampling stage as one function of logits [N, V], or None when it is empty."""
        if not self.sampling:
            return None

        def shape(logits: Tensor) -> Tensor:
            for bound in self.sampling:
                arguments: dict[str, Any] = {"logits": logits, "step": step, "total_steps": total_steps}
                logits = bound.part.function(
                    **{n: arguments[n] for n in bound.part.inputs}, **bound.at(step, total_steps)
                )
            return logits

        return shape

    # -- the plan -----------------------------------------------------------------------------------

    def keep(
        self,
        rollouts: Rollouts,
        state: Mapping[str, Any] | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
    ) -> Tensor:
        """[B] bool from the refilling select parts alone, which need no model: may these rows enter the batch?

        `state` is `Plan.state` of the previous step, read and not changed.
        """
        ctx = self._context(rollouts, Signals(), step, total_steps, None)
        kept = torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.mask.device)
        for i, bound in enumerate(self.select):
            if bound.part.refill:
                result = ctx.call(bound, (state or {}).get(f"select/{i}/{bound.part.name}"))
                result = result[0] if "state" in bound.part.inputs else result
                kept &= _rows_kept(bound, _named(result, "keep"), kept)
        return kept

    def plan(
        self,
        rollouts: Rollouts,
        signals: Signals,
        state: Mapping[str, Any] | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
        generator: torch.Generator | None = None,
        one_update: bool = False,
    ) -> Plan:
        """Decide everything about a batch: rewards, advantages, rows, weights, updates and their scales.

        Args:
            rollouts: the whole batch, gathered over ranks, with `rewards`.
            signals: those named in `needs`; gradients are ignored.
            state: `Plan.state` of the previous step.
            generator: for parts that draw; default is seeded with `step`.
            one_update: put all kept rows into a single update whatever the updates part says.

        Raises:
            ValueError: when rewards or a needed signal are missing, or a part returns a wrong shape.
        """
        if rollouts.rewards is None:
            raise ValueError("plan needs rollouts.rewards; score the responses first")
        with torch.no_grad():
            ctx = self._context(rollouts, signals, step, total_steps, generator)
            new_state = dict(state or {})
            metrics: dict[str, float] = {}

            def run(key: str, bound: Bound, gives: str) -> dict[str, Any]:
                result = ctx.call(bound, new_state.get(key))
                if "state" in bound.part.inputs:
                    if not (isinstance(result, tuple) and len(result) == 2):
                        raise ValueError(f"part {bound.part.name!r} takes 'state' and must give (value, state)")
                    result, new_state[key] = result
                named = _named(result, gives)
                if gives not in named:
                    raise ValueError(f"part {bound.part.name!r} must give {gives!r}, got {sorted(named)}")
                for name, value in named.pop("metrics", {}).items():
                    metrics[f"{bound.part.name}/{name}"] = float(value)
                return named

            parts = dict(self.bound_parts())
            for i, bound in enumerate(self.reward):
                ctx.put_rewards(run(f"reward/{i}/{bound.part.name}", bound, "rewards")["rewards"])
            for name, value in run("advantage", self.advantage, "advantages").items():
                _expect(self.advantage, value, rollouts.mask)
                ctx.put(name, value)
            keep = torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.mask.device)
            for i, bound in enumerate(self.select):
                keep &= _rows_kept(bound, run(f"select/{i}/{bound.part.name}", bound, "keep"), keep)
            ctx = self._restrict(ctx, keep)
            for i, bound in enumerate(self.credit):
                if not bound.late:
                    value = run(f"credit/{i}/{bound.part.name}", bound, "advantages")["advantages"]
                    ctx.put("advantages", _expect(bound, value, rollouts.mask))
            policy_weights = self._weights("weight", self.weight, ctx, run)
            ctx.put("weights", policy_weights)
            if one_update:
                updates = [keep.nonzero().reshape(-1)] if bool(keep.any()) else []
            else:
                updates = run("updates", parts["updates"], "rows")["rows"]
            terms = [self._weights(f"terms/{i}/weight", t.weight, ctx, run) for i, t in enumerate(self.terms)]
            ctx.put("weights", policy_weights)
            made = tuple(self._update(ctx, rows, terms) for rows in updates if len(rows))
            values = dict(ctx.values) | {"keep": keep, "scale": _scatter(made, rollouts.mask)}
            metrics["kept"] = float(keep.float().mean()) if len(rollouts) else 0.0
            metrics["live"] = float(sum(int(u.live.sum()) for u in made)) / max(1, sum(len(u) for u in made))
            advantages, mask = ctx.values["advantages"], ctx.mask
            metrics["advantage/abs"] = float(masked_mean(advantages.abs(), mask))
        return Plan(made, values, new_state, metrics)

    def refresh(self, update: Update, signals: Signals, generator: torch.Generator | None = None) -> Update:
        """Evaluate, for a whole update, the parts that couple rows and read the policy being trained.

        `signals` are those of `loss_needs` for all rows of the update, gradients ignored.
        """
        if not self.needs_refresh:
            return update
        if not update.whole:
            raise ValueError("refresh sees rows together: pass the whole update, and slice what it gives")
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            ctx = self._loss_context(update, signals.detach())
            ctx.put("generator", generator or _seeded(update.constants["step"], update.rows.device))
            for key, bound in self.bound_parts():
                # In the order of the loss, so that what reads advantages sees them after the credit parts.
                if not bound.late or bound.part.stage not in ("credit", "weight"):
                    continue
                if bound.coupled or bound.part.stage == "credit":
                    value = _expect(bound, ctx.call(bound), ctx.mask)
                    if bound.coupled:
                        found[f"late/{key}"] = value
                    if bound.part.stage == "credit":
                        ctx.put("advantages", value)
        return replace(update, tensors=update.tensors | found)

    # -- the loss -----------------------------------------------------------------------------------

    def loss(self, signals: Signals, update: Update) -> tuple[Tensor, Metrics]:
        """The loss (scalar, to minimize) of an update or of any micro-batch `update[rows]` of it, and its metrics.

        `signals` are those of `loss_needs` for the same rows. Sums over a split equal the whole.

        Raises:
            ValueError: when a part that couples rows was not settled by `refresh` before slicing.
        """
        if self.needs_refresh and not any(k.startswith("late/") for k in update.tensors):
            if not update.whole:
                raise ValueError(
                    f"{[b.part.name for b in self._late_weights() if b.late and b.coupled]} must see the whole "
                    "update: call algorithm.refresh(update, signals) before slicing it"
                )
            update = self.refresh(update, signals)
        ctx = self._loss_context(update, signals)
        mask, tensors = ctx.mask, update.tensors
        for i, bound in enumerate(self.credit):
            if bound.late:
                ctx.put("advantages", self._late(f"credit/{i}/{bound.part.name}", bound, ctx, tensors))
        weights = tensors["weights"]
        for i, bound in enumerate(self.weight):
            if bound.late:
                weights = weights * self._late(f"weight/{i}/{bound.part.name}", bound, ctx, tensors)
        objective = _expect(self.surrogate, ctx.call(self.surrogate), mask)
        scale = where_mask(tensors["scale"] * weights, mask)
        loss = -(scale * where_mask(objective, mask)).sum()
        metrics = self._measure(ctx, scale)
        metrics.add("loss/policy", loss.detach())
        for i, term in enumerate(self.terms):
            value = _expect(term.part, ctx.call(term.part), mask)
            part_scale = tensors[f"scale/{i}"]
            for j, bound in enumerate(term.weight):
                if bound.late:
                    part_scale = part_scale * self._late(f"terms/{i}/weight/{j}/{bound.part.name}", bound, ctx, tensors)
            contribution = (where_mask(part_scale, mask) * where_mask(value, mask)).sum()
            loss = loss + _coef(term, update) * contribution
            metrics.add(f"loss/{term.part.part.name}", contribution.detach())
            metrics.add(f"{term.part.part.name}/mean", masked_sum(value.detach(), mask), mask.sum())
        metrics.add("loss", loss.detach())
        return loss, metrics

    def coefficients(
        self,
        rollouts: Rollouts,
        signals: Signals,
        state: Mapping[str, Any] | None = None,
        **surroundings: Any,
    ) -> dict[str, Tensor]:
        """-d loss / d signal for every differentiable signal, all rows in one update: {name: [B, T]}.

        The entry for `logprobs` is the picture of an algorithm: what it does to each token. `signals`
        needs `logprobs` and whatever else `needs` and `loss_needs` name.
        """
        plan = self.plan(rollouts, signals, state, one_update=True, **surroundings)
        present = {"values" if n == "old_values" else n: v for n, v in signals.named().items() if n == "old_values"}
        present |= signals.named()
        leaves = {n: present[n].detach().clone().requires_grad_() for n in self.loss_needs if n in present}
        if "logprobs" not in leaves:
            raise ValueError("coefficients need signals.logprobs")
        total = sum(
            (self.loss(signals.replace(**leaves).rows(u.rows), u)[0] for u in plan.updates),
            torch.zeros((), device=rollouts.mask.device),
        )
        if not total.requires_grad:
            return {n: torch.zeros_like(v) for n, v in leaves.items()}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            n: torch.zeros_like(leaf) if g is None else -g for (n, leaf), g in zip(leaves.items(), grads, strict=True)
        }

    # -- helpers ------------------------------------------------------------------------------------

    def _context(
        self,
        rollouts: Rollouts,
        signals: Signals,
        step: int,
        total: int | None,
        generator: torch.Generator | None,
    ) -> Context:
        names = ("tokens", "lengths", "group_ids", "truncated", "answers", "prompts", "sampler_logprobs",
                 "policy_version")  # fmt: skip
        values: dict[str, Any] = {n: getattr(rollouts, n) for n in names}
        outcomes = rollouts.rewards
        if outcomes is not None and not outcomes.is_floating_point():
            outcomes = outcomes.to(torch.float32 if signals.logprobs is None else signals.logprobs.dtype)
        values |= {"outcomes": outcomes, "max_tokens": rollouts.sampling.max_tokens or None, "step": step}
        device = rollouts.mask.device
        values |= {"total_steps": total, "generator": generator or _seeded(step, device)}
        values |= signals.detach().named()
        if values.get("old_values") is not None:
            values["values"] = values["old_values"]
        ctx = Context(values, rollouts.mask)
        if outcomes is not None:
            ctx.put_rewards(outcomes)
        return ctx

    def _restrict(self, ctx: Context, keep: Tensor) -> Context:
        values = {k: v for k, v in ctx.values.items() if k != "mask"}
        return Context(values | {"keep": keep}, ctx.mask & keep[:, None])

    def _weights(self, key: str, bounds: tuple[Bound, ...], ctx: Context, run: Any) -> Tensor:
        dtype = ctx.values["advantages"].dtype
        weights = ctx.mask.to(dtype)
        for i, bound in enumerate(bounds):
            if not bound.late:
                ctx.put("weights", weights)
                value = run(f"{key}/{i}/{bound.part.name}", bound, "weights")["weights"]
                weights = where_mask(weights * _expect(bound, value, ctx.mask), ctx.mask)
        return weights

    def _update(self, ctx: Context, rows: Tensor, term_weights: list[Tensor]) -> Update:
        values = ctx.values
        cut = {k: _cut(v, rows) for k, v in values.items()}
        local = Context({k: v for k, v in cut.items() if k != "mask"}, cut["mask"])
        tensors: dict[str, Tensor] = {
            "mask": cut["mask"],
            "advantages": cut["advantages"],
            "weights": cut["weights"],
        }
        tensors["scale"] = _expect(self.aggregate, local.call(self.aggregate), local.mask)
        live = (tensors["scale"] * tensors["weights"] * tensors["advantages"]).ne(0).any(-1)
        if any(b.late for b in self.credit):
            live |= (tensors["scale"] * tensors["weights"]).ne(0).any(-1)
        for i, (term, weights) in enumerate(zip(self.terms, term_weights, strict=True)):
            local.put("weights", weights[rows])
            aggregate = term.aggregate or self.aggregate
            scale = _expect(aggregate, local.call(aggregate), local.mask)
            tensors[f"scale/{i}"] = where_mask(scale * weights[rows], local.mask)
            live |= tensors[f"scale/{i}"].ne(0).any(-1)
        for bound in self._late_parts():
            for name in bound.part.inputs:
                if name in self.loss_needs or name in CURRENT or name in ("lo", "hi", "cap", *_CONSTANTS, "generator"):
                    continue
                if isinstance(cut.get(name), Tensor):
                    tensors.setdefault(name, cut[name])
        if "old_logprobs" in cut:
            tensors.setdefault("old_logprobs", cut["old_logprobs"])
        return Update(rows, tensors, {k: values.get(k) for k in _CONSTANTS}, live)

    def _loss_context(self, update: Update, signals: Signals) -> Context:
        current = {n: v for n, v in signals.named().items() if n in self.loss_needs}
        if "logprobs" not in current:
            raise ValueError(f"the loss needs the signals {sorted(self.loss_needs)}; got {sorted(signals.named())}")
        mask = update.tensors["mask"]
        if current["logprobs"].shape != mask.shape:
            raise ValueError(
                f"signals are {tuple(current['logprobs'].shape)}, the update is {tuple(mask.shape)}: pass the same rows"
            )
        held = {k: v for k, v in update.tensors.items() if k != "mask" and "/" not in k}
        ctx = Context(held | update.constants | current, mask)
        if ctx.get("old_logprobs") is None:
            ctx.put("old_logprobs", ctx.get("logprobs").detach())
        ctx.put("log_ratio", ctx.call(self.log_ratio))
        limits = ctx.call(self.bounds)
        if not isinstance(limits, tuple) or len(limits) != 3:
            raise ValueError(f"part {self.bounds.part.name!r} must give (lo, hi, cap), got {limits!r}")
        for name, value in zip(("lo", "hi", "cap"), limits, strict=True):
            ctx.put(name, value)
        return ctx

    def _late(self, key: str, bound: Bound, ctx: Context, tensors: Mapping[str, Tensor]) -> Tensor:
        if bound.coupled:
            return tensors[f"late/{key}"]
        with torch.no_grad():
            return _expect(bound, ctx.call(bound), ctx.mask)

    def _measure(self, ctx: Context, scale: Tensor) -> Metrics:
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
            multiplier = ctx.multiplier(self.surrogate)
            if multiplier is not None:
                metrics.add("surrogate/clipped", (acting & multiplier.expand(mask.shape).eq(0)).sum(), acting.sum())
        return metrics

    def _plan_parts(self) -> list[tuple[str, Bound]]:
        found = [(k, b) for k, b in self.bound_parts() if not b.late]
        own = {"surrogate", "log_ratio", "bounds"}
        found = [(k, b) for k, b in found if k not in own and b.part.stage not in ("term", "sampling")]
        return found + [(f"terms/{i}/aggregate", t.aggregate) for i, t in enumerate(self.terms) if t.aggregate]

    def _late_weights(self) -> list[Bound]:
        every = (*self.credit, *self.weight, *(w for t in self.terms for w in t.weight))
        return [b for b in every if b.late]

    def _late_parts(self) -> list[Bound]:
        own = [self.log_ratio, self.bounds, self.surrogate, *(t.part for t in self.terms)]
        return [*own, *self._late_weights()]

    def _signals_of(self, bound: Bound) -> set[str]:
        return {n for n in bound.part.inputs if n in SIGNAL_NAMES or n in CHUNK_SIGNALS}

    def _aggregates(self) -> Iterator[tuple[Bound, tuple[Bound, ...]]]:
        yield self.aggregate, self.weight
        yield from ((t.aggregate or self.aggregate, t.weight) for t in self.terms)

    def _one_update(self) -> bool:
        """Surely one optimizer step a batch; an updates part that does not say so may make several."""
        known = {k: h.default for k, h in self.updates.part.hyperparameters.items()} | self.updates.params
        return all(known.get(k) == 1 for k in ("epochs", "mini_batches"))


def _coef(term: Term, update: Update) -> float:
    return float(resolve(term.coef, update.constants["step"], update.constants["total_steps"]))


def _stage_of(key: str) -> str:
    """The stage that a key of `bound_parts` stands for."""
    head, _, rest = key.partition("/")
    if head == "terms":
        return "weight" if rest.split("/")[1] == "weight" else "term"
    return head


def _rows_kept(bound: Bound, named: Mapping[str, Any], like: Tensor) -> Tensor:
    keep = named.get("keep")
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != like.shape:
        got = f"{tuple(keep.shape)} {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"part {bound.part.name!r} must give bool [B] = {tuple(like.shape)}, got {got}")
    return keep


def _named(result: Any, gives: str) -> dict[str, Any]:
    return dict(result) if isinstance(result, Mapping) else {gives: result}


def _expect(bound: Bound, value: Any, mask: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != mask.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"part {bound.part.name!r} must give [B, T] = {tuple(mask.shape)}, got {shape}")
    return value


def _cut(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value[rows]
    return tuple(value[i] for i in rows.tolist()) if isinstance(value, tuple) else value


def _scatter(updates: tuple[Update, ...], mask: Tensor) -> Tensor:
    """The scale of each row in the first update that holds it, [B, T]."""
    dtype = updates[0].tensors["scale"].dtype if updates else torch.float32
    out = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    for update in reversed(updates):
        out[update.rows] = update.tensors["scale"]
    return out


def _seeded(step: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(step)
