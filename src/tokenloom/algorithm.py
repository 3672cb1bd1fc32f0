"""`Algorithm`: a composition of parts that plans a batch and states its loss.

loss = -sum(scale * weights * objective) + sum over terms k of coef_k * sum(scale_k * weights_k * term_k)

Terms over a corpus, `corpus`, are added to every update on rows of plain text instead of responses.
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

from tokenloom import losses
from tokenloom.batch import Rollouts
from tokenloom.catalog import check_parameters, get_preset, parts, suggest
from tokenloom.composition import Blend, Bound, PartSpec, Term, parse, parse_blend, parse_many, parse_term, parse_terms
from tokenloom.plan import Metrics, Plan, Update
from tokenloom.planning import Planner, expect, plan_context, rows_that_may_enter
from tokenloom.signals import ATTENTION_SIGNALS, CHUNK_SIGNALS, SIGNAL_NAMES, Signals, signal_names
from tokenloom.vocabulary import CURRENT, EXTRAS, GIVEN_BY_ADVANTAGES

_SINGLE = ("advantage", "aggregate", "log_ratio", "bounds", "surrogate", "updates")
_LISTS = ("sampling", "reward", "select", "credit", "weight", "metrics")
_STAGES = (*_SINGLE, *_LISTS, "terms", "corpus", "blend", "branch")
_STATEFUL = ("reward", "advantage", "select", "credit", "weight", "updates")
_OF_A_CORPUS = frozenset({"tokens", "lengths", "mask", "group_ids", "weights", "step", "total_steps"})


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
    blend: Blend | None = None
    branch: Bound | None = None
    metrics: tuple[Bound, ...] = ()
    corpus: tuple[Term, ...] = ()
    preset: str = "custom"

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_corpus()
        for bound in self._in_every_micro_batch():
            if bound.coupled:
                raise ValueError(
                    f"part {bound.part.name!r} has scope {bound.part.scope!r} and cannot stand in the loss, which is "
                    "computed on micro-batches; make what couples the rows a weight part (it may read the policy)"
                )
        for bound in (*self.credit, *self.weight, *(w for t in self.terms for w in t.weight)):
            if bound.late and "state" in bound.part.inputs:
                raise ValueError(f"part {bound.part.name!r} reads the policy being trained and cannot carry state")
        second = (self.blend.part, self.blend.advantage) if self.blend else ()
        planned = (*self.reward, self.advantage, *self.select, self.updates, *(a for a, _ in self._aggregates()))
        for bound in (*planned, *second, *self.metrics):
            if bound.late:
                raise ValueError(
                    f"part {bound.part.name!r} reads {sorted(CURRENT & set(bound.part.inputs))}, which does not exist "
                    f"yet at stage {bound.part.stage!r}; read 'old_logprobs' instead"
                )
        for _, bound in self.bound_parts():
            for name in GIVEN_BY_ADVANTAGES & bound.part.inputs.keys():
                if bound.part.inputs[name] and name not in self.advantage.part.gives:
                    givers = sorted(p.name for p in parts().values() if name in p.gives)
                    raise ValueError(
                        f"part {bound.part.name!r} needs {name!r}, which the advantage part "
                        f"{self.advantage.part.name!r} does not give; parts that do: {', '.join(givers)}"
                    )
        for aggregate, weights in self._aggregates():
            if aggregate.params.get("count") == "weights" and any(w.late for w in weights):
                late = [w.part.name for w in weights if w.late]
                raise ValueError(f"count='weights' cannot see {late}, which read the policy being trained")

    def _in_every_micro_batch(self) -> list[Bound]:
        second = [self.blend.surrogate] if self.blend and self.blend.surrogate else []
        return [self.surrogate, self.log_ratio, self.bounds, *second, *(t.part for t in self.terms)]

    def _check_stages(self) -> None:
        placed = [(b, _stage_of(key)) for key, b in self.bound_parts()]
        placed += [(t.aggregate, "aggregate") for t in self.terms if t.aggregate]
        for bound, stage in placed:
            name, inputs = bound.part.name, set(bound.part.inputs)
            if bound.part.stage != stage:
                raise ValueError(f"{name!r} is a part of stage {bound.part.stage!r} and cannot stand at {stage!r}")
            # A sampling part reads the state of its method and hands nothing on.
            if "state" in inputs and stage not in (*_STATEFUL, "sampling"):
                raise ValueError(f"part {name!r} cannot carry state at stage {stage!r}; stages that do: {_STATEFUL}")
            if stage == "branch" and (signals := self._signals_of(bound)):
                raise ValueError(f"part {name!r} reads {sorted(signals)}, which is not there before the batch is")
            if stage == "sampling" and (unknown := inputs - {"logits", "step", "total_steps", "state"}):
                raise ValueError(f"part {name!r} reads {sorted(unknown)}, which is not there while sampling")

    def _check_corpus(self) -> None:
        """Text that nobody sampled has no advantages, no rewards and no policy before the update."""
        for term in self.corpus:
            signals = {"logprobs", "entropies"} | {n for n, s in CHUNK_SIGNALS.items() if not s.given}
            aggregate = term.aggregate or self.aggregate
            placed = [(term.part, "term", _OF_A_CORPUS | signals), (aggregate, "aggregate", _OF_A_CORPUS)]
            placed += [(w, "weight", _OF_A_CORPUS) for w in term.weight]
            for bound, stage, known in placed:
                name, inputs = bound.part.name, bound.part.inputs
                if bound.part.stage != stage:
                    raise ValueError(f"corpus: {name!r} is a part of stage {bound.part.stage!r}, here stands a {stage}")
                if missing := sorted(n for n, required in inputs.items() if required and n not in known):
                    remedy = "; give the term an aggregate of its own" if bound is self.aggregate else ""
                    raise ValueError(f"corpus: part {name!r} reads {missing}, which rows of plain text lack{remedy}")
            if term.part.coupled:
                raise ValueError(f"corpus: {term.part.part.name!r} couples rows, but is computed on micro-batches")

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
        blend: Any = None,
        branch: PartSpec | None = None,
        metrics: Any = (),
        corpus: Any = (),
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
            blend=parse_blend(blend),
            branch=None if branch is None else parse("branch", branch),
            metrics=parse_many("metric", metrics, ()),
            corpus=parse_terms(corpus, ()),
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
        stages = {k: v for k, v in spec.items() if k in _STAGES}
        rest = {k: v for k, v in spec.items() if k not in stages and k != "preset"}
        if "preset" not in spec:
            if rest:
                known = ["preset", *_STAGES]
                raise ValueError("; ".join(f"algorithm: unknown key {k!r}{suggest(k, known)}" for k in rest))
            if "advantage" not in stages:
                raise ValueError("algorithm: name a preset, or at least the stage 'advantage'")
            return cls.compose(**stages)
        found = get_preset(spec["preset"])
        for key in rest:
            if key not in found.parameters:
                known = [*found.parameters, *_STAGES]
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
                changes[name] = parse_many("metric" if name == "metrics" else name, spec, current or ())  # type: ignore[arg-type]
            elif name in ("terms", "corpus"):
                changes[name] = parse_terms(spec, current or ())
            elif name == "blend":
                changes[name] = parse_blend(spec, self.blend)
            elif name == "branch":
                changes[name] = None if spec is None else parse("branch", spec, self.branch)
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
        if self.blend is not None:
            yield "blend", self.blend.part
            yield "blend/advantage", self.blend.advantage
            if self.blend.surrogate is not None:
                yield "blend/surrogate", self.blend.surrogate

    def recipe(self) -> dict[str, Any]:
        """The composition spelled out, as a mapping that `from_recipe` reads back."""
        out: dict[str, Any] = {name: getattr(self, name).recipe() for name in _SINGLE}
        out |= {name: [b.recipe() for b in getattr(self, name)] for name in _LISTS if getattr(self, name)}
        out |= {"terms": [t.recipe() for t in self.terms]} if self.terms else {}
        out |= {"corpus": [t.recipe() for t in self.corpus]} if self.corpus else {}
        out |= {"branch": self.branch.recipe()} if self.branch else {}
        return out | ({"blend": self.blend.recipe()} if self.blend else {})

    def describe(self) -> list[str]:
        """One line per part: stage, name, every hyperparameter, paper."""
        lines = []
        for name in ("sampling", "reward", "advantage", "select", "credit", "weight", "updates", "aggregate",
                     "log_ratio", "bounds", "surrogate", "metrics"):  # fmt: skip
            value = getattr(self, name)
            lines += [f"{name:<10} {b}  [{b.part.paper}]" for b in (value if isinstance(value, tuple) else (value,))]
        lines += [f"{'term':<10} {t}  [{t.part.part.paper}]" for t in self.terms]
        lines += [f"{'corpus':<10} {t}  [{t.part.part.paper}]" for t in self.corpus]
        lines += [f"{'branch':<10} {self.branch}  [{self.branch.part.paper}]"] if self.branch else []
        return lines + ([f"{'blend':<10} {self.blend}  [{self.blend.part.part.paper}]"] if self.blend else [])

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute without gradient before `plan`."""
        names: set[str] = set()
        for _, bound in self._plan_parts():
            names |= self._signals_of(bound) - CURRENT
        names = {"old_values" if n == "values" else n for n in names}
        for bound in self.late_parts():
            names |= {n for n in self._signals_of(bound) if n.startswith(("old_", "ref_"))}
        names |= self.given
        if self._one_update() and not any("old_logprobs" in b.part.inputs for _, b in self._plan_parts()):
            # With a single update the old policy is the policy at the forward of the loss itself.
            names -= {"old_logprobs"}
        return frozenset(names)

    @property
    def loss_needs(self) -> frozenset[str]:
        """Signals to compute with gradient for `loss`."""
        names = {"logprobs"}
        for bound in self.late_parts():
            names |= {n for n in self._signals_of(bound) if not n.startswith(("old_", "ref_"))}
        return frozenset(names - {"log_ratio", "ratio"})

    @property
    def corpus_needs(self) -> frozenset[str]:
        """Signals to compute with gradient for `corpus_loss`; empty without terms over a corpus."""
        names = {n for t in self.corpus for n in self._signals_of(t.part)}
        return frozenset(names | {"logprobs"}) if self.corpus else frozenset()

    @property
    def given(self) -> frozenset[str]:
        """Signals taken before the update that signals of the loss take as inputs; they are among `needs`."""
        chunks = [CHUNK_SIGNALS[n] for n in self.loss_needs if n in CHUNK_SIGNALS]
        return frozenset(n for signal in chunks for n in signal.given)

    @property
    def rollout_needs(self) -> frozenset[str]:
        """What parts or their signals read of `Rollouts.extras`, to be collected with the responses."""
        names = {n for _, bound in self.bound_parts() for n in bound.part.inputs}
        names |= {n for signal in names & ATTENTION_SIGNALS.keys() for n in ATTENTION_SIGNALS[signal].inputs}
        if self.branch is None:
            names -= {"segment_values"}  # there is nothing to draw; parts fall back on what they have
        return frozenset(names & EXTRAS.keys())

    @property
    def needs_whole_rows(self) -> bool:
        """Whether a part of the loss sees the tokens of a row together, so that a row is live as a whole or not."""
        return any(b.part.scope != "token" and not b.coupled for b in self.late_parts())

    @property
    def refill(self) -> bool:
        """Whether a select part wants dropped groups replaced by newly sampled ones."""
        return any(b.part.refill for b in self.select)

    @property
    def needs_refresh(self) -> bool:
        """Whether parts couple rows and read the policy being trained, so that `refresh` must run per update."""
        return any(b.coupled for b in self.late_weights())

    def shape_logits(
        self, *, step: int = 0, total_steps: int | None = None, state: Mapping[str, Any] | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """The sampling stage as one function of logits [N, V], or None when it is empty.

        `state` is `Plan.state` of the previous step; a sampling part reads what its own method left there.
        """
        if not self.sampling:
            return None

        def shape(logits: Tensor) -> Tensor:
            for bound in self.sampling:
                arguments: dict[str, Any] = {"logits": logits, "step": step, "total_steps": total_steps}
                if "state" in bound.part.inputs:
                    arguments["state"] = self._state_of(bound.part.slug, state or {})
                logits = bound.part.function(
                    **{n: arguments[n] for n in bound.part.inputs}, **bound.at(step, total_steps)
                )
            return logits

        return shape

    def branches(self, rollouts: Rollouts, *, step: int = 0, total_steps: int | None = None) -> Tensor | None:
        """How many further responses to draw from the state before each token, [B, T] int64; None without that stage.

        The mean rewards of those responses are collected as `segment_values`.
        """
        if self.branch is None:
            return None
        ctx = plan_context(rollouts, Signals(), step, total_steps, None)
        return expect(self.branch, ctx.call(self.branch), rollouts.mask)

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
        return rows_that_may_enter(self, rollouts, state, step, total_steps)

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
        ctx = plan_context(rollouts, signals, step, total_steps, generator)
        return Planner(self, ctx, state or {}).plan(one_update=one_update)

    def refresh(self, update: Update, signals: Signals, generator: torch.Generator | None = None) -> Update:
        """Evaluate, for a whole update, the parts that couple rows and read the policy being trained.

        `signals` are those of `loss_needs` for all rows of the update, gradients ignored.
        """
        return losses.refresh(self, update, signals, generator) if self.needs_refresh else update

    # -- the loss -----------------------------------------------------------------------------------

    def loss(self, signals: Signals, update: Update) -> tuple[Tensor, Metrics]:
        """The loss (scalar, to minimize) of an update or of any micro-batch `update[rows]` of it, and its metrics.

        `signals` are those of `loss_needs` for the same rows; only the entries at `update.live` are read (a part
        that `refresh` settles saw all of them). Sums over a split equal the whole.

        Raises:
            ValueError: when a part that couples rows was not settled by `refresh` before slicing.
        """
        return losses.loss(self, signals, update)

    def corpus_loss(
        self,
        signals: Signals,
        rollouts: Rollouts,
        rows: Tensor | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The terms over a corpus (scalar, to minimize) of rows of plain text or of a micro-batch, and their metrics.

        Args:
            signals: those of `corpus_needs` for `rows`; entries off the mask are not read.
            rollouts: the whole corpus batch of the update, which settles the scales: a row's prompt is its first
                token, its response the tokens behind, `mask` those that enter the loss. Nothing else is read.
            rows: [n] int64, which rows `signals` speak of; None: all. Sums over a split equal the whole.

        Raises:
            ValueError: for signals that are missing or of another shape.
        """
        return losses.corpus_loss(self, signals, rollouts, rows, step, total_steps)

    def coefficients(
        self,
        rollouts: Rollouts,
        signals: Signals,
        state: Mapping[str, Any] | None = None,
        **surroundings: Any,
    ) -> dict[str, Tensor]:
        """-d loss / d signal for every differentiable signal, all rows in one update: {name: [B, T]}.

        Terms over a corpus are left out: they speak of other rows.

        The entry for `logprobs` is the picture of an algorithm: what it does to each token. `signals`
        needs `logprobs` and whatever else `needs` and `loss_needs` name.
        """
        return losses.coefficients(self, rollouts, signals, state=state, **surroundings)

    # -- helpers ------------------------------------------------------------------------------------

    def late_weights(self) -> list[Bound]:
        """The credit and weight parts, of terms too, that read the policy being trained."""
        every = (*self.credit, *self.weight, *(w for t in self.terms for w in t.weight))
        return [b for b in every if b.late]

    def late_parts(self) -> list[Bound]:
        """Every part that runs beside the loss."""
        own = [self.log_ratio, self.bounds, self.surrogate, *(t.part for t in self.terms)]
        if self.blend is not None and self.blend.surrogate is not None:
            own.append(self.blend.surrogate)
        return [*own, *self.late_weights()]

    def _plan_parts(self) -> list[tuple[str, Bound]]:
        found = [(k, b) for k, b in self.bound_parts() if not b.late]
        own = {"surrogate", "log_ratio", "bounds", "blend/surrogate", "branch"}
        found = [(k, b) for k, b in found if k not in own and b.part.stage not in ("term", "sampling")]
        return found + [(f"terms/{i}/aggregate", t.aggregate) for i, t in enumerate(self.terms) if t.aggregate]

    def _signals_of(self, bound: Bound) -> set[str]:
        return {n for n in bound.part.inputs if n in SIGNAL_NAMES or n in signal_names()}

    def _aggregates(self) -> Iterator[tuple[Bound, tuple[Bound, ...]]]:
        yield self.aggregate, self.weight
        yield from ((t.aggregate or self.aggregate, t.weight) for t in self.terms)

    def _one_update(self) -> bool:
        """Surely one optimizer step a batch; an updates part that does not say so may make several."""
        known = {k: h.default for k, h in self.updates.part.hyperparameters.items()} | self.updates.params
        return all(known.get(k) == 1 for k in ("epochs", "mini_batches"))

    def _state_of(self, slug: str, state: Mapping[str, Any]) -> Any:
        """What the first stateful part of a method handed on, None at first."""
        keys = [k for k, b in self.bound_parts() if b.part.slug == slug and b.part.stage != "sampling"]
        return next((state[k] for k in keys if k in state), None)


def _stage_of(key: str) -> str:
    """The stage that a key of `bound_parts` stands for."""
    head, _, rest = key.partition("/")
    if head == "terms":
        return "weight" if rest.split("/")[1] == "weight" else "term"
    if head == "metrics":
        return "metric"
    return rest if head == "blend" and rest else head
