"""Bound parts and terms: what an `Algorithm` is made of, and how recipes describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from tokenloom.catalog import Part, Stage, get_part
from tokenloom.hints import suggest
from tokenloom.parameters import check_parameters
from tokenloom.schedule import Schedule, resolve
from tokenloom.vocabulary import CURRENT


@dataclass(frozen=True)
class Bound:
    """A part with its hyperparameters. `source` is the name it was found under (an import path for users' parts)."""

    part: Part
    params: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def with_params(self, **params: Any) -> Self:
        """A copy with some hyperparameters changed, checked by name and type."""
        checked = check_parameters(self.part.name, params, self.part.hyperparameters)
        return replace(self, params=self.params | checked)

    def at(self, step: int, total_steps: int | None) -> dict[str, Any]:
        """Hyperparameters at a step, schedules resolved; defaults are left to the function."""
        return {k: resolve(v, step, total_steps) for k, v in self.params.items()}

    @property
    def late(self) -> bool:
        """It reads the policy being trained, so it runs beside the loss and not in the plan."""
        return bool(CURRENT & set(self.part.inputs))

    @property
    def coupled(self) -> bool:
        """It must see rows together, so it cannot run inside a micro-batch."""
        return self.part.scope in ("group", "batch")

    def recipe(self) -> dict[str, Any]:
        """The mapping that `parse` reads back."""
        return {"part": self.source or self.part.name} | {k: _plain(v) for k, v in self.params.items()}

    def __str__(self) -> str:
        defaults = {k: h.default for k, h in self.part.hyperparameters.items()}
        shown = ", ".join(f"{k}={v}" for k, v in (defaults | self.params).items())
        return f"{self.source or self.part.name}({shown})"


@dataclass(frozen=True)
class Term:
    """A further loss, minimized: coef x sum of scale x weights x part. `aggregate=None` uses the policy term's."""

    part: Bound
    coef: float | Schedule = 1.0
    aggregate: Bound | None = None
    weight: tuple[Bound, ...] = ()

    def recipe(self) -> dict[str, Any]:
        """The mapping that `parse_term` reads back."""
        out = self.part.recipe() | {"coef": _plain(self.coef)}
        if self.aggregate is not None:
            out["aggregate"] = self.aggregate.recipe()
        if self.weight:
            out["weight"] = [w.recipe() for w in self.weight]
        return out

    def __str__(self) -> str:
        extra = f", aggregate {self.aggregate}" if self.aggregate else ""
        extra += "".join(f", weight {w}" for w in self.weight)
        return f"{self.coef} x {self.part}{extra}"


@dataclass(frozen=True)
class Blend:
    """A second (advantage, surrogate) branch: objective = share * first + (1 - share) * second.

    `part` gives the first branch's share in [0, 1], [B] or [B, T]; `surrogate=None` uses the first branch's.
    """

    part: Bound
    advantage: Bound
    surrogate: Bound | None = None

    def recipe(self) -> dict[str, Any]:
        """The mapping that `parse_blend` reads back."""
        out = self.part.recipe() | {"advantage": self.advantage.recipe()}
        return out | ({"surrogate": self.surrogate.recipe()} if self.surrogate else {})

    def __str__(self) -> str:
        extra = f", surrogate {self.surrogate}" if self.surrogate else ""
        return f"{self.part}, advantage {self.advantage}{extra}"


PartSpec = str | Mapping[str, Any] | Bound


def bind(name: str, stage: Stage | None = None, /, **params: Any) -> Bound:
    """Find a part and fix hyperparameters: `bind("grpo", eps=1e-4)`.

    Raises:
        ValueError: unknown part, wrong stage, unknown parameter or wrong type.
    """
    return Bound(get_part(name, stage), {}, name if ":" in name else "").with_params(**params)


def parse(stage: Stage, spec: PartSpec, current: Bound | None = None) -> Bound:
    """Read a recipe's description of one part: a name, a mapping with `part`, or hyperparameters for `current`."""
    if isinstance(spec, Bound):
        return spec
    if isinstance(spec, str):
        return bind(spec, stage)
    if not isinstance(spec, Mapping):
        raise ValueError(f"{stage}: expected a part's name or a mapping, got {spec!r}")
    params = {k: v for k, v in spec.items() if k != "part"}
    if "part" in spec:
        return bind(spec["part"], stage, **params)
    if current is None:
        raise ValueError(f"{stage}: {dict(spec)!r} names no part; add the key 'part'")
    return current.with_params(**params)


def parse_many(stage: Stage, spec: Any, current: Sequence[Bound]) -> tuple[Bound, ...]:
    """Read a list stage: a list replaces, {name: parameters or null} changes, adds or removes, null empties."""
    if spec is None:
        return ()
    if isinstance(spec, str | Bound) or (isinstance(spec, Mapping) and "part" in spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        table = _by_name(stage, [(b.source or b.part.name, b) for b in current])
        for name, params in spec.items():
            if params is None:
                if table.pop(name, None) is None:
                    raise ValueError(f"{stage}: there is no {name!r} to remove{suggest(name, table)}")
            elif not isinstance(params, Mapping):
                raise ValueError(f"{stage}: {name}: expected parameters or null, got {params!r}")
            else:
                table[name] = parse(stage, params if name in table else {"part": name, **params}, table.get(name))
        return tuple(table.values())
    if not isinstance(spec, list | tuple):
        raise ValueError(f"{stage}: expected a list, a mapping or null, got {spec!r}")
    return tuple(parse(stage, s) for s in spec)


def parse_term(spec: str | Mapping[str, Any] | Term, current: Term | None = None) -> Term:
    """Read a term: a name, or a mapping with `part`, `coef`, `aggregate`, `weight` and the part's parameters."""
    if isinstance(spec, Term):
        return spec
    if isinstance(spec, str):
        return Term(bind(spec, "term"))
    if not isinstance(spec, Mapping):
        raise ValueError(f"terms: expected a part's name or a mapping, got {spec!r}")
    own = {k: v for k, v in spec.items() if k not in ("coef", "aggregate", "weight")}
    part = parse("term", own, current.part if current else None)
    coef = spec.get("coef", current.coef if current else 1.0)
    if isinstance(coef, Mapping):
        try:
            coef = Schedule.parse(coef)
        except ValueError as error:
            raise ValueError(f"terms: {part.part.name}: coef: {error}") from None
    if isinstance(coef, bool) or not isinstance(coef, int | float | Schedule):
        raise ValueError(f"terms: {part.part.name}: coef = {coef!r} is not allowed; it takes a number or a schedule")
    aggregate = current.aggregate if current else None
    if "aggregate" in spec:
        given = spec["aggregate"]
        aggregate = None if given is None else parse("aggregate", given, aggregate)
    weight = current.weight if current else ()
    if "weight" in spec:
        weight = parse_many("weight", spec["weight"], weight)
    return Term(part, coef, aggregate, weight)


def parse_blend(spec: Mapping[str, Any] | Blend | None, current: Blend | None = None) -> Blend | None:
    """Read the blend: a mapping with `part`, `advantage`, `surrogate` and the part's parameters; null removes it."""
    if spec is None or isinstance(spec, Blend):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"blend: expected a mapping with 'part' and 'advantage', or null, got {spec!r}")
    own = {k: v for k, v in spec.items() if k not in ("advantage", "surrogate")}
    part = parse("blend", own, current.part if current else None)
    if "advantage" not in spec and current is None:
        raise ValueError(f"blend: {part.part.name}: name the second branch's 'advantage'")
    advantage = current.advantage if current else None
    if "advantage" in spec:
        advantage = parse("advantage", spec["advantage"], advantage)
    surrogate = current.surrogate if current else None
    if "surrogate" in spec:
        given = spec["surrogate"]
        surrogate = None if given is None else parse("surrogate", given, surrogate)
    assert advantage is not None
    return Blend(part, advantage, surrogate)


def parse_terms(spec: Any, current: Sequence[Term]) -> tuple[Term, ...]:
    """Read the terms: a list replaces, {name: parameters or null} changes, adds or removes, null empties."""
    if spec is None:
        return ()
    if isinstance(spec, str | Term) or (isinstance(spec, Mapping) and "part" in spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        table = _by_name("terms", [(t.part.source or t.part.part.name, t) for t in current])
        for name, params in spec.items():
            if params is None:
                if table.pop(name, None) is None:
                    raise ValueError(f"terms: there is no {name!r} to remove{suggest(name, table)}")
            elif not isinstance(params, Mapping):
                raise ValueError(f"terms: {name}: expected parameters or null, got {params!r}")
            else:
                table[name] = parse_term(params if name in table else {"part": name, **params}, table.get(name))
        return tuple(table.values())
    if not isinstance(spec, list | tuple):
        raise ValueError(f"terms: expected a list, a mapping or null, got {spec!r}")
    return tuple(parse_term(s) for s in spec)


T = TypeVar("T")


def _by_name(stage: str, entries: list[tuple[str, T]]) -> dict[str, T]:
    table = dict(entries)
    if len(table) < len(entries):
        names = [n for n, _ in entries]
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"{stage}: {twice} stand there more than once, so a name is ambiguous; give the whole list")
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        out = {"schedule": value.shape, "start": value.start, "end": value.end}
        out |= {"power": value.power} if value.shape == "power" else {}
        return out | ({"steps": value.steps} if value.steps else {}) | ({"delay": value.delay} if value.delay else {})
    return value
