"""Decoding methods by name: what builds a processor, a generate loop, a drafter, a verifier, a constraint, a detector.

A builder is a class or function in a module of `tokenloom.decode`, registered by `@decoder(slug, kind=...)`. Its
keyword-only parameters are hyperparameters (number, text, truth value), checked by name and type; its positional ones
are objects that only the caller has: `model`, `tokenizer`, or what its docstring says. Rules of stage "truncate" or
"shape" that need nothing but the law or the scores are shapers by themselves, with no builder written.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from tokenloom.catalog import parts
from tokenloom.hints import suggest
from tokenloom.parameters import Hyperparameter, check_parameters, signature_inputs

Kind = Literal["shaper", "loop", "drafter", "verifier", "constraint", "detector"]
B = TypeVar("B", bound=Callable[..., Any])


@dataclass(frozen=True)
class Decoder:
    """A registered builder; `inputs` maps the objects it takes to whether they are required."""

    slug: str
    kind: Kind
    build: Callable[..., Any]
    inputs: dict[str, bool]
    parameters: dict[str, Hyperparameter]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]


_DECODERS: dict[tuple[Kind, str], Decoder] = {}
_loaded = False


def decoder(slug: str, *, kind: Kind) -> Callable[[B], B]:
    """Register a builder under a slug; a slug may have one of each kind."""

    def register(build: B) -> B:
        inputs, parameters = signature_inputs(slug, build, any_name=True)
        _DECODERS[kind, slug] = Decoder(slug, kind, build, inputs, parameters)
        return build

    return register


def decoders(kind: Kind | None = None) -> dict[str, Decoder]:
    """Every registered decoder by slug (of one kind, or of all: then the last kind of a slug wins)."""
    _load()
    return {slug: d for (k, slug), d in sorted(_DECODERS.items()) if kind in (None, k)}


def build(kind: Kind, slug: str, objects: Mapping[str, Any] | None = None, /, **parameters: Any) -> Any:
    """Build the decoder `slug` of `kind`; `objects` holds what it may need by name, such as model and tokenizer.

    Raises:
        ValueError: for an unknown name, parameter or value, or a missing object.
    """
    known = decoders(kind)
    if slug not in known:
        elsewhere = [d.kind for d in decoders().values() if d.slug == slug]
        hint = f"; it is a {elsewhere[0]}" if elsewhere else suggest(slug, known)
        raise ValueError(f"unknown {kind} {slug!r}{hint}")
    found = known[slug]
    given = check_parameters(f"{kind} {slug!r}", parameters, found.parameters)
    objects = objects or {}
    missing = [name for name, required in found.inputs.items() if required and objects.get(name) is None]
    if missing:
        raise ValueError(f"{kind} {slug!r} needs {' and '.join(missing)}; {found.summary}")
    return found.build(**{n: objects[n] for n in found.inputs if objects.get(n) is not None}, **given)


def shaper(slug: str, /, *, model: Any = None, tokenizer: Any = None, **parameters: Any) -> Any:
    """A `LogitsProcessor` by name: `model.generate(..., logits_processor=[shaper("top-h", alpha=0.4)])`."""
    return _build_with("shaper", slug, model, tokenizer, parameters)


def loop(slug: str, /, *, model: Any = None, tokenizer: Any = None, **parameters: Any) -> Any:
    """A generate loop by name: `model.generate(..., custom_generate=loop("cntp"))`."""
    return _build_with("loop", slug, model, tokenizer, parameters)


def _build_with(kind: Kind, slug: str, model: Any, tokenizer: Any, parameters: dict[str, Any]) -> Any:
    known = decoders(kind)
    objects = {"model": model, "tokenizer": tokenizer}
    if slug in known:
        # Objects that only this method takes (a reward, a second model) come as keywords too.
        own = {n: parameters.pop(n) for n in known[slug].inputs if n in parameters}
        objects |= own
    return build(kind, slug, objects, **parameters)


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    root = importlib.import_module("tokenloom.decode")
    for module in pkgutil.walk_packages(root.__path__, "tokenloom.decode."):
        importlib.import_module(module.name)
    from tokenloom.decode.shapers import rule_shaper

    for part in parts().values():
        required = [name for name, needed in part.inputs.items() if needed]
        alone = {"truncate": ["probs"], "shape": ["scores"]}.get(part.stage)
        if required == alone and ("shaper", part.slug) not in _DECODERS and part.name == part.slug:
            _DECODERS["shaper", part.slug] = Decoder(
                part.slug, "shaper", rule_shaper(part), {}, dict(part.hyperparameters)
            )


KINDS: tuple[Kind, ...] = get_args(Kind)
