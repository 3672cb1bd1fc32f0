"""`tokenloom detect-watermark`: was a text written with a watermark's key?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tokenloom.cli.console import console, quiet_libraries, table, visible
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source
from tokenloom.cli.prompts import checked, read_lines, standard_input


@guarded
def detect_watermark(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose tokenizer the text was written with.")],
    watermark: Annotated[str, typer.Argument(metavar="WATERMARK", help="NAME:key=number,..., as when it was written.")],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text; - reads standard input.")] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="A .jsonl file (response or text) or a .txt file, one text a line.")
    ] = None,
) -> None:
    """Test texts for a watermark and print p-values: the chance that text without the key looks like that.

    The text alone, without its prompt; a hundred tokens tell more than twenty. Nothing but the tokenizer is loaded. The
    distortion-free watermark compares with random keys: with resamples=999 instead of 99, p-values go down to 0.001.

    Examples:
      tokenloom generate my/model --prompts questions.txt -s distortion-free-watermark:key=42 --out answers.jsonl
      tokenloom detect-watermark my/model distortion-free-watermark:key=42 --texts answers.jsonl
      tokenloom detect-watermark my/model green-list-watermark:key=7,gamma=0.25 "The text in question."
    """
    from tokenloom.decode import specs

    try:
        named = specs.parse(watermark)
        if len(named) != 1:
            raise ValueError(f"{watermark!r} names {len(named)} watermarks; look for one at a time")
        [spec] = named
        found = specs.find(spec, ("detector",))
        specs.parameters(spec, found)
    except ValueError as error:
        raise UsageError(str(error)) from None
    given = _texts(text, texts)
    quiet_libraries(console(stderr=True))
    tokenizer, vocabulary = _tokenizer(model)
    try:
        detect = specs.made(spec, found, {"vocabulary": vocabulary})
    except ValueError as error:
        raise UsageError(str(error)) from None
    shown = table("text", "tokens", "statistic", "p-value")
    refused: list[str] = []
    for each in given:
        ids = tokenizer.encode(each, add_special_tokens=False)
        head = visible(" ".join(each.split()))
        try:
            result = detect(ids)
            numbers = f"{result.statistic:.2f}", f"{result.p_value:.2g}"
        except ValueError as error:  # too short, most often
            refused.append(str(error))
            numbers = "-", "-"
        shown.add_row(Text(head if len(head) <= 60 else head[:59] + "…"), f"{len(ids)}", *numbers)
    if len(refused) == len(given):
        raise UsageError(refused[0])
    console().print(shown)
    if refused:
        console(stderr=True).print(
            f"{len(refused)} of {len(given)} texts cannot be tested: {refused[0]}", style="yellow"
        )


def _tokenizer(model: str) -> tuple[Any, int]:
    from transformers import AutoConfig, AutoTokenizer

    from tokenloom.policy import loading

    try:
        source = loading.resolve(model_source(model))
        # Not even asked for: a tokenizer's own code may do anything.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model} has no tokenizer that loads: {str(error).strip().splitlines()[0]}") from None
    return tokenizer, int(config.get_text_config().vocab_size)


def _texts(text: str | None, file: Path | None) -> list[str]:
    if (text is None) == (file is None):
        raise UsageError("give a TEXT, or a file of them with --texts; - as the TEXT reads standard input")
    if text is not None:
        found = [checked(standard_input() if text == "-" else text, "the text")]
    else:
        assert file is not None
        found = read_lines(file, _text_of, str)
    if not found or not all(t.strip() for t in found):
        raise UsageError("there is an empty text, or none at all; a detector needs some tokens")
    return found


def _text_of(record: Any) -> str:
    found = record.get("response", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(found, str):
        raise ValueError('a line is {"response": "..."} or {"text": "..."}')
    return checked(found, "the text")
