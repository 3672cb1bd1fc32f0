"""Decoding methods named on the command line, made for a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenloom.cli.console import program
from tokenloom.cli.guard import UsageError
from tokenloom.cli.models import model_source
from tokenloom.cli.prompts import read_file

if TYPE_CHECKING:
    from tokenloom.batch import Sampling
    from tokenloom.decode.constraints import Written
    from tokenloom.decode.registry import Decoder
    from tokenloom.decode.respond import Decoding
    from tokenloom.decode.specs import Spec

log = logging.getLogger(__name__)

_LISTS = ("phrases", "ngrams", "patterns")

CONSTRAINT_HELP = (
    "What responses must be: json-schema=@FILE, regex=PATTERN, choice=yes|no, lark=@FILE or predicate=FILE.py:NAME. "
    "Holds by masks, which distort the law; --sampler awrs and smc correct for that."
)


def decoding_of(
    policy: Any, methods: str, draft: str | None, sampling: Sampling, constraint: Written | None = None
) -> Decoding:
    """The decoding that `methods` and `draft` name, between the temperature and the cuts of `sampling`.

    Raises:
        UsageError: as `named`, for values out of range, or for a constraint that the tokenizer cannot write.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from tokenloom.decode import specs
    from tokenloom.decode.respond import Decoding
    from tokenloom.decode.speculative import Speculative

    objects = {"model": policy.model, "tokenizer": policy.tokenizer}
    if constraint is not None:
        try:
            objects["constraint"] = constraint.made(policy.tokenizer)
        except ValueError as error:
            raise UsageError(f"--constraint {error}") from None
    shapers: list[Any] = []
    loop: dict[str, Any] = {}
    if sampling.temperature not in (0, 1):
        shapers.append(TemperatureLogitsWarper(sampling.temperature))
    for spec, found in named(methods, draft, constrained=constraint is not None):
        try:
            made = specs.made(spec, found, objects, partial(load_object, policy, spec.given))
        except ValueError as error:
            raise UsageError(str(error)) from None
        if found.kind == "loop":
            loop = {"loop": made}
            if draft is not None and not isinstance(made, Speculative):
                raise UsageError(f"{spec.slug} does not draft: name it with --sampler {spec.slug}")
        else:
            shapers.append(made)
    if sampling.top_k:
        shapers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        shapers.append(TopPLogitsWarper(sampling.top_p))
    return Decoding(
        shapers, sample=sampling.temperature > 0, max_tokens=sampling.max_tokens,
        constraint=objects.get("constraint"), **loop,
    )  # fmt: skip


def named(methods: str, draft: str | None = None, *, constrained: bool = False) -> list[tuple[Spec, Decoder]]:
    """The methods that are named, with their parameters checked; nothing is loaded for it.

    Raises:
        UsageError: for what is unknown, has the wrong type, lacks what it works with, or does not go with another
            method or a constraint.
    """
    from tokenloom.decode import specs

    try:
        found = [(spec, specs.find(spec)) for spec in (specs.parse(methods) if methods else [])]
        found += [(spec, _draft(spec)) for spec in (specs.parse(draft) if draft else [])]
        for spec, decoder in found:
            specs.parameters(spec, decoder)
            _check_constraint(spec.slug, decoder, "constraint" in spec.given, constrained)
            _check_inputs(spec, decoder)
    except ValueError as error:
        raise UsageError(str(error)) from None
    loops = [spec.slug for spec, decoder in found if decoder.kind == "loop"]
    if len(loops) > 1:
        raise UsageError(f"{' and '.join(loops)} each decide how decoding goes on; name one")
    return found


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
    except ImportError:
        raise
    except Exception as error:  # from a predicate's file, whose writer can mend it
        raise UsageError(f"--constraint {text}: {type(error).__name__}: {error}") from error


def constraint_note(stand: Sequence[str | None], max_tokens: int) -> str:
    """How many responses do not fulfill the constraint, by how they stand, and why; empty when all do."""
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


def _draft(spec: Spec) -> Decoder:
    from tokenloom.decode import specs
    from tokenloom.decode.registry import decoders

    if spec.slug not in decoders("loop"):
        if spec.slug in decoders("drafter"):
            raise UsageError(f"{spec.slug} is a drafter for any verifier: --draft speculative:drafter={spec.slug}")
        if spec.slug in decoders("shaper"):
            raise UsageError(f"{spec.slug} does not draft: name it with --sampler {spec.slug}")
    return specs.find(spec, ("loop",))


def _check_inputs(spec: Spec, found: Decoder) -> None:
    at_hand = {"model", "tokenizer", "constraint", *spec.given}
    missing = [name for name, required in found.inputs.items() if required and name not in at_hand]
    if missing:
        told = ",".join(f"{name}=..." for name in missing)
        raise UsageError(
            f"{spec.slug} needs {' and '.join(missing)}: add {spec.slug}:{told}, a model, a file, or FILE.py:NAME for "
            f"what is yours; see: {program()} methods {spec.slug}"
        )


def load_object(policy: Any, given: Mapping[str, str], name: str, text: str) -> Any:
    """What a method's parameter `name` stands for, one of those `given`.

    A drafter or verifier by name; `file.py:function` or `module:function`; a file of a head (.safetensors), laid on the
    model of `policy`; any other file, as its path, or as its lines where texts are asked for, of which one may stand
    for itself; else a model, or for a parameter that asks for one its tokenizer. How good a student or a head was on
    held-out data is logged, if it is known.

    Raises:
        ValueError: when there is no such thing, or a model has another tokenizer than that of `policy`.
    """
    if name in ("probe", "gauge"):  # these methods read their own files
        if not Path(text).is_file():
            raise ValueError(f"{name}={text}: there is no file {text}")
        return text
    from tokenloom.decode.registry import KINDS, build, decoders

    for kind in KINDS:
        if name == kind and text in decoders(kind):
            return build(kind, text, {"model": policy.model, "tokenizer": policy.tokenizer})
    if text.lower().endswith(".safetensors"):
        from tokenloom.decode.heads import load_head, quality_beside

        head = load_head(text, policy.model)
        _tell(name, text, quality_beside(text))
        return head
    if Path(text).is_file():
        return [x for x in read_file(Path(text)).split("\n") if x.strip()] if name in _LISTS else text
    # A Windows path has a colon, too, behind the letter of its drive.
    if ":" in text[2:]:
        return _imported(f"{name}={text}", text)
    if name in _LISTS:
        return [text]
    from tokenloom.decode.pair_quality import QUALITY_FILE, Quality
    from tokenloom.policy import Policy
    from tokenloom.policy.loading import load_tokenizer, resolve

    source = model_source(text)
    try:
        if name.endswith("tokenizer"):
            return load_tokenizer(resolve(source))
        second = Policy.load(source)
    except ValueError as error:
        raise ValueError(f"{name}={text} is no file, no FILE.py:NAME and no model that loads: {error}") from None
    if name != "others" and f"{name}_tokenizer" not in given:
        _check_tokenizer(f"{name}={text}", policy.tokenizer, second.tokenizer)
    if (Path(source) / QUALITY_FILE).is_file():
        _tell(name, text, Quality.load(Path(source)))
    return second.model


def _imported(what: str, target: str) -> Any:
    from tokenloom.tasks.importing import import_target

    try:
        return import_target(target)
    except ValueError:
        raise
    except Exception as error:  # whatever the person's file raises is the person's to mend
        raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error


def _check_tokenizer(what: str, mine: Any, other: Any) -> None:
    """Sizes alone do not tell: tokenizers of many families have 32,000 tokens."""
    if other is None:
        return
    known, asked = mine.get_vocab(), other.get_vocab()
    same = sum(known.get(token) == number for token, number in asked.items())
    # Models of one family may have a few special tokens of their own.
    if same < 0.99 * min(len(known), len(asked)):
        raise ValueError(
            f"{what} has another tokenizer ({same:,} of {len(asked):,} tokens are the same); take a model of the same "
            f"family, or make one: {program()} distill"
        )


def _tell(name: str, text: str, quality: Any) -> None:
    if quality is not None:
        log.info("%s %s, held out: %s", name, text, quality.line())
