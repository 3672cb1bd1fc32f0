"""Decoding methods named on the command line, made for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenloom.cli.guard import UsageError
from tokenloom.cli.models import model_source

if TYPE_CHECKING:
    from tokenloom.batch import Sampling
    from tokenloom.decode.respond import Decoding


def decoding_of(policy: Any, methods: str, draft: str | None, sampling: Sampling) -> Decoding:
    """The decoding that `methods` and `draft` name, between the temperature and the cuts of `sampling`.

    Raises:
        UsageError: for two loops at once.
        ValueError: for unknown names or parameters.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from tokenloom.decode import specs
    from tokenloom.decode.respond import Decoding

    objects = {"model": policy.model, "tokenizer": policy.tokenizer}
    shapers: list[Any] = []
    loops: list[tuple[str, Any]] = []
    if sampling.temperature not in (0, 1):
        shapers.append(TemperatureLogitsWarper(sampling.temperature))
    for spec in specs.parse(methods) if methods else []:
        found = specs.find(spec)
        made = specs.made(spec, found, objects, load_object)
        if found.kind == "loop":
            loops.append((spec.slug, made))
        else:
            shapers.append(made)
    for spec in specs.parse(draft) if draft else []:
        loops.append((spec.slug, specs.made(spec, specs.find(spec, ("loop",)), objects, load_object)))
    if len(loops) > 1:
        raise UsageError(f"{' and '.join(name for name, _ in loops)} each decide how decoding goes on; name one")
    if sampling.top_k:
        shapers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        shapers.append(TopPLogitsWarper(sampling.top_p))
    given = {"loop": loops[0][1]} if loops else {}
    return Decoding(shapers, sample=sampling.temperature > 0, max_tokens=sampling.max_tokens, **given)


def check_names(methods: str, draft: str | None = None) -> None:
    """Look up the methods and their parameters, before anything is loaded.

    Raises:
        UsageError: for what is unknown or has the wrong type.
    """
    from tokenloom.decode import specs

    try:
        for spec in specs.parse(methods) if methods else []:
            specs.parameters(spec, specs.find(spec))
        for spec in specs.parse(draft) if draft else []:
            specs.parameters(spec, specs.find(spec, ("loop",)))
    except ValueError as error:
        raise UsageError(str(error)) from None


def load_object(name: str, text: str) -> Any:
    """What a method's parameter `name` stands for: `file.py:function`, `module:function`, or else a model."""
    if ":" in text:
        from tokenloom.tasks.importing import import_target

        return import_target(text)
    from tokenloom.policy import Policy

    return Policy.load(model_source(text)).model
