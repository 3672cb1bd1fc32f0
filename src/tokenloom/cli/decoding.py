"""Decoding methods named on the command line, made for a model."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenloom.cli.guard import UsageError
from tokenloom.cli.models import model_source

if TYPE_CHECKING:
    from tokenloom.batch import Sampling
    from tokenloom.decode.constraints import Written
    from tokenloom.decode.registry import Decoder
    from tokenloom.decode.respond import Decoding, Responses

log = logging.getLogger(__name__)

CONSTRAINT_HELP = (
    "What responses must be: json-schema=@FILE, regex=PATTERN, choice=yes|no, lark=@FILE or predicate=FILE.py:NAME. "
    "Holds by masks, which distort the law; --sampler awrs and smc correct for that."
)


def decoding_of(
    policy: Any, methods: str, draft: str | None, sampling: Sampling, constraint: Written | None = None
) -> Decoding:
    """The decoding that `methods` and `draft` name, between the temperature and the cuts of `sampling`.

    Raises:
        UsageError: for two loops at once, or a constraint that the tokenizer cannot write.
        ValueError: for unknown names or parameters.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from tokenloom.decode import specs
    from tokenloom.decode.respond import Decoding

    objects = {"model": policy.model, "tokenizer": policy.tokenizer}
    if constraint is not None:
        try:
            objects["constraint"] = constraint.made(policy.tokenizer)
        except ValueError as error:
            raise UsageError(f"--constraint {error}") from None
    load = partial(load_object, policy)
    shapers: list[Any] = []
    loops: list[tuple[str, Any]] = []
    if sampling.temperature not in (0, 1):
        shapers.append(TemperatureLogitsWarper(sampling.temperature))
    for spec in specs.parse(methods) if methods else []:
        found = specs.find(spec)
        made = specs.made(spec, found, objects, load)
        if found.kind == "loop":
            loops.append((spec.slug, made))
        else:
            shapers.append(made)
    for spec in specs.parse(draft) if draft else []:
        loops.append((spec.slug, specs.made(spec, specs.find(spec, ("loop",)), objects, load)))
    if len(loops) > 1:
        raise UsageError(f"{' and '.join(name for name, _ in loops)} each decide how decoding goes on; name one")
    if sampling.top_k:
        shapers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        shapers.append(TopPLogitsWarper(sampling.top_p))
    given = {"loop": loops[0][1]} if loops else {}
    return Decoding(
        shapers, sample=sampling.temperature > 0, max_tokens=sampling.max_tokens,
        constraint=objects.get("constraint"), **given,
    )  # fmt: skip


def check_names(methods: str, draft: str | None = None, *, constrained: bool = False) -> None:
    """Look up the methods and their parameters, before anything is loaded.

    Raises:
        UsageError: for what is unknown, has the wrong type, or does not go with a constraint, or without.
    """
    from tokenloom.decode import specs

    try:
        named = [(spec, specs.find(spec)) for spec in (specs.parse(methods) if methods else [])]
        named += [(spec, specs.find(spec, ("loop",))) for spec in (specs.parse(draft) if draft else [])]
        for spec, found in named:
            specs.parameters(spec, found)
            _check_constraint(spec.slug, found, "constraint" in spec.given, constrained)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_constraint(text: str | None) -> Written | None:
    """What --constraint says, before anything is loaded.

    Raises:
        ImportError: without the library for it.
        UsageError: for what cannot be read.
    """
    if text is None:
        return None
    from tokenloom.decode.constraints import read

    try:
        return read(text)
    except ValueError as error:
        raise UsageError(f"--constraint {error}") from None


def constraint_note(found: Responses, max_tokens: int) -> str:
    """How many responses do not fulfill the constraint, and why; empty when all do."""
    stand = [a.standing for a in found.answers]
    cut, failed = stand.count("unfinished"), stand.count("failed")
    reasons = []
    if cut:
        reasons.append(f"{cut} cut at --max-tokens {max_tokens}")
    if failed:
        reasons.append(f"{failed} with weight 0, where no way led to an end (what is shown is the beginning)")
    return f"of {len(stand)} responses, {' and '.join(reasons)}" if reasons else ""


def _check_constraint(name: str, found: Decoder, own: bool, constrained: bool) -> None:
    if found.inputs.get("constraint") and not own and not constrained:
        raise UsageError(f"{name} needs to know what responses must be: add --constraint, such as 'regex=[0-9]+'")
    if own and constrained:
        raise UsageError(f"{name} is given a constraint twice; leave out --constraint or {name}:constraint=...")
    if constrained and (reason := getattr(found.build, "unmasked", "")):
        raise UsageError(f"{name} {reason}, which no constraint can follow; leave one of the two out")


def load_object(policy: Any, name: str, text: str) -> Any:
    """What a method's parameter `name` stands for.

    `file.py:function` or `module:function`; a file of a head (.safetensors), laid on the model of `policy`; any other
    file, as its path; else a model, or for a parameter that asks for one its tokenizer. How good a student or a head
    was on held-out data is logged, if it is known.

    Raises:
        ValueError: when there is no such thing.
    """
    if name in ("probe", "gauge"):  # these methods read their own files
        return text
    if text.lower().endswith(".safetensors"):
        from tokenloom.decode.heads import load_head, quality_beside

        head = load_head(text, policy.model)
        _tell(name, text, quality_beside(text))
        return head
    if Path(text).is_file():
        return text
    # A Windows path has a colon, too, behind the letter of its drive.
    if ":" in text[2:]:
        from tokenloom.tasks.importing import import_target

        return import_target(text)
    source = model_source(text)
    if name.endswith("tokenizer"):
        from tokenloom.policy.loading import load_tokenizer, resolve

        return load_tokenizer(resolve(source))
    from tokenloom.decode.pair_quality import QUALITY_FILE, Quality
    from tokenloom.policy import Policy

    model = Policy.load(source).model
    if (Path(source) / QUALITY_FILE).is_file():
        _tell(name, text, Quality.load(Path(source)))
    return model


def _tell(name: str, text: str, quality: Any) -> None:
    if quality is not None:
        log.info("%s %s, held out: %s", name, text, quality.line())
