"""The catalog: parts, presets, and how they are found by name.

A part is a plain function. Its positional parameters are vocabulary names and are injected (at the stages
of training; those of decoding are called by what drives the model); one with a default is injected when present. Its
keyword-only parameters are hyperparameters, and their annotations and defaults are the recipe's schema.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from tokenloom.hints import suggest
from tokenloom.parameters import Hyperparameter, signature_inputs
from tokenloom.signals import same_definition
from tokenloom.user_code import imported

TrainingStage = Literal[
    "sampling", "reward", "advantage", "select", "credit", "weight", "aggregate",
    "log_ratio", "bounds", "surrogate", "term", "updates", "blend", "branch", "metric",
]  # fmt: skip
DecodingStage = Literal[
    "truncate", "shape", "choose", "draft", "verify", "search", "rank", "probe", "bytes", "objective", "analysis"
]
"""truncate: probs [B, V] -> keep [B, V]; shape: scores [B, V] and more -> scores [B, V]; choose: a token from a law;
draft, verify: speculative decoding; search: the rules of a segment search; rank: finished candidates -> scores or a
choice; probe: hidden states -> scores; bytes: text behind tokens; objective: the loss of an auxiliary model or probe;
analysis: numbers that describe."""
Stage = TrainingStage | DecodingStage
TRAINING_STAGES: tuple[str, ...] = get_args(TrainingStage)
DECODING_STAGES: tuple[str, ...] = get_args(DecodingStage)
Scope = Literal["token", "row", "group", "batch"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Part:
    """A registered part. `inputs` maps injected names to whether they are required."""

    name: str
    stage: Stage
    scope: Scope
    paper: str
    function: Callable[..., Any]
    inputs: dict[str, bool]
    hyperparameters: dict[str, Hyperparameter]
    multiplier: Callable[..., Any] | None = None
    refill: bool = False
    gives: frozenset[str] = frozenset()
    properties: frozenset[str] = frozenset()

    @property
    def slug(self) -> str:
        """The method that the part belongs to."""
        return self.name.split("/")[0]

    @property
    def family(self) -> str:
        """The folder of `methods/` that the part lives in, "user" for parts from elsewhere."""
        return _family(self.function)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


@dataclass(frozen=True)
class Preset:
    """A registered composition: a function of keyword parameters that returns an `Algorithm`."""

    slug: str
    paper: str
    function: Callable[..., Any]
    parameters: dict[str, Hyperparameter]

    @property
    def family(self) -> str:
        """The folder of `methods/` that the preset lives in."""
        return _family(self.function)

    @property
    def dialects(self) -> tuple[str, ...]:
        """Frameworks whose reading of the name the preset reproduces."""
        found = self.parameters.get("dialect")
        return tuple(get_args(found.annotation)) if found else ()


@dataclass(frozen=True)
class Method:
    """Everything the catalog knows under one slug."""

    slug: str
    family: str
    paper: str
    document: str
    parts: list[Part] = field(default_factory=list)
    preset: Preset | None = None

    @property
    def stages(self) -> list[str]:
        """The stages of its parts; `preset` alone for a pure composition."""
        return sorted({p.stage for p in self.parts}) or ["preset"]


_PARTS: dict[str, Part] = {}
_PRESETS: dict[str, Preset] = {}
_loaded = False


def part(
    name: str,
    *,
    stage: Stage,
    scope: Scope,
    paper: str,
    multiplier: Callable[..., Any] | None = None,
    refill: bool = False,
    gives: Iterable[str] = (),
    properties: Iterable[str] = (),
) -> Callable[[F], F]:
    """Register a function as a part; the function itself is returned unchanged.

    Args:
        name: `slug`, or `slug/part` when the method has several.
        scope: how much of the batch it must see at once.
        paper: "arXiv:NNNN.NNNNN" or another citation.
        multiplier: for surrogates, the closed form of d objective / d logprobs / advantages at the
            token ratio, a function of vocabulary names and the same hyperparameters.
        refill: for select parts, whether dropped groups are to be replaced by newly sampled ones.
        gives: vocabulary names that an advantage part hands on besides its advantages, e.g. "returns".
        properties: declared exemptions from laws, e.g. "order-dependent".

    Raises:
        ValueError: for a positional parameter outside the vocabulary, a hyperparameter without a
            default, an unknown stage or scope, or a name that another function holds.
    """
    known_stages = (*TRAINING_STAGES, *DECODING_STAGES)
    if stage not in known_stages:
        raise ValueError(f"part {name!r}: unknown stage {stage!r}{suggest(stage, known_stages)}")
    if scope not in get_args(Scope):
        raise ValueError(f"part {name!r}: unknown scope {scope!r}{suggest(scope, get_args(Scope))}")

    def register(function: F) -> F:
        # What decoding hands over is as various as its methods; only training injects by name.
        inputs, hyperparameters = signature_inputs(name, function, any_name=stage in DECODING_STAGES)
        if multiplier is not None:
            signature_inputs(f"{name} (multiplier)", multiplier)
        own = {"term": {"coef", "aggregate", "weight"}, "blend": {"advantage", "surrogate"}}
        reserved = {"part"} | own.get(stage, set())
        if taken := reserved & set(hyperparameters):
            raise ValueError(f"part {name!r}: recipes use {sorted(taken)} themselves; rename the hyperparameter")
        made = Part(
            name=name,
            stage=stage,
            scope=scope,
            paper=paper,
            function=function,
            inputs=inputs,
            hyperparameters=hyperparameters,
            multiplier=multiplier,
            refill=refill,
            gives=frozenset(gives),
            properties=frozenset(properties),
        )
        _claim(_PARTS, name, made)
        function.__dict__["__part__"] = made
        return function

    return register


def preset(slug: str, *, paper: str) -> Callable[[F], F]:
    """Register a function of keyword-only parameters that returns an `Algorithm`."""

    def register(function: F) -> F:
        inputs, parameters = signature_inputs(slug, function)
        if inputs:
            raise ValueError(f"preset {slug!r}: parameters must be keyword-only, got {sorted(inputs)}")
        made = Preset(slug, paper, function, parameters)
        _claim(_PRESETS, slug, made)
        function.__dict__["__preset__"] = made
        return function

    return register


def get_part(name: str, stage: Stage | None = None) -> Part:
    """Find a part by name, by import path (`my_parts.py:my_rule`, `package.module:rule`), or by entry point.

    Raises:
        ValueError: when it is unknown or belongs to another stage than `stage`.
    """
    if not isinstance(name, str):
        raise ValueError(f"{stage or 'part'}: a part is named by text, got {name!r}")
    if ":" in name:
        found = getattr(imported(name), "__part__", None)
        if not isinstance(found, Part):
            raise ValueError(f"{name!r} is not a part: decorate the function with @part(...)")
    elif name in parts():
        found = parts()[name]
    else:
        same_stage = [p.name for p in parts().values() if stage in (None, p.stage)]
        hint = f"; a file's part is named {name + ':function'!r}" if name.endswith(".py") else suggest(name, same_stage)
        raise ValueError(f"unknown {stage + ' ' if stage else ''}part {name!r}{hint}")
    if stage is not None and found.stage != stage:
        choices = sorted(p.name for p in parts().values() if p.stage == stage)
        raise ValueError(
            f"{name!r} is a part of stage {found.stage!r} and cannot stand at stage {stage!r}; "
            f"parts of that stage: {', '.join(choices)}"
        )
    return found


def get_preset(slug: str) -> Preset:
    """Find a preset by slug or import path.

    Raises:
        ValueError: when it is unknown.
    """
    if not isinstance(slug, str):
        raise ValueError(f"an algorithm's preset is named by text, got {slug!r}")
    if ":" in slug:
        found = getattr(imported(slug), "__preset__", None)
        if not isinstance(found, Preset):
            raise ValueError(f"{slug!r} is not a preset: decorate it with @preset(...)")
        return found
    if slug not in presets():
        hint = " It names a part: put it into a stage of another preset." if slug in parts() else ""
        raise ValueError(f"unknown algorithm {slug!r}{suggest(slug, presets())}{hint}")
    return presets()[slug]


def parts() -> dict[str, Part]:
    """Every registered part by name, library and entry points loaded."""
    _load()
    return _PARTS


def presets() -> dict[str, Preset]:
    """Every registered preset by slug."""
    _load()
    return _PRESETS


def methods() -> dict[str, Method]:
    """The catalog by slug: parts, preset, family, paper and the documentation of the method's file."""
    table: dict[str, Method] = {}
    entries: list[Preset | Part] = [*presets().values(), *parts().values()]
    for entry in entries:
        document = inspect.getdoc(inspect.getmodule(entry.function)) or ""
        known = table.setdefault(entry.slug, Method(entry.slug, entry.family, entry.paper, document))
        if isinstance(entry, Part):
            known.parts.append(entry)
        else:
            object.__setattr__(known, "preset", entry)
    return dict(sorted(table.items()))


def _claim(table: dict[str, Any], name: str, made: Any) -> None:
    held = table.get(name)
    if held is not None and not same_definition(held.function, made.function):
        where = f"{held.function.__module__}.{held.function.__qualname__}"
        raise ValueError(f"the name {name!r} is held by {where}; choose another")
    table[name] = made


def _family(function: Callable[..., Any]) -> str:
    head, _, rest = function.__module__.partition("tokenloom.methods.")
    return rest.split(".")[0].replace("_", "-") if not head and rest else "user"


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True  # set first: an entry point may ask for the catalog while it is imported
    try:
        root = importlib.import_module("tokenloom.methods")
        for module in pkgutil.walk_packages(root.__path__, "tokenloom.methods."):
            importlib.import_module(module.name)
    except BaseException:
        _loaded = False
        raise
    for entry in importlib.metadata.entry_points(group="tokenloom.parts"):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"entry point {entry.name} = {entry.value!r}: {error}; its parts are missing", stacklevel=3)
