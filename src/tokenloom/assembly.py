"""`Assembly`: the parts of an algorithm, each at its stage; put together, read from a recipe, changed, written down.

Nothing here computes: what an assembly does with a batch is said in `algorithm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from tokenloom import compatibility
from tokenloom.catalog import get_preset
from tokenloom.composition import Blend, Bound, PartSpec, Term, parse, parse_blend, parse_many, parse_term, parse_terms
from tokenloom.hints import suggest
from tokenloom.parameters import check_parameters

_SINGLE = ("advantage", "aggregate", "log_ratio", "bounds", "surrogate", "updates")
_LISTS = ("sampling", "reward", "select", "credit", "weight", "metrics")
_STAGES = (*_SINGLE, *_LISTS, "terms", "corpus", "blend", "branch")


@dataclass(frozen=True)
class Assembly:
    """Bound parts, one per stage or a list of them; `preset` names where they came from.

    Raises:
        ValueError: when parts cannot stand together.
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
        compatibility.check(self)

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
                changes[name] = parse_many("metric" if name == "metrics" else name, spec, current or ())  # type: ignore[arg-type]  # as above
            elif name in ("terms", "corpus"):
                changes[name] = parse_terms(spec, current or ())
            elif name == "blend":
                changes[name] = parse_blend(spec, self.blend)
            elif name == "branch":
                changes[name] = None if spec is None else parse("branch", spec, self.branch)
            else:
                raise ValueError(f"unknown stage {name!r}{suggest(name, _STAGES)}")
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
