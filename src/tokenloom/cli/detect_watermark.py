"""`tokenloom detect-watermark`: was a text written with a watermark's key?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tokenloom.cli.console import console, quiet_libraries, table, visible
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source


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

    The text alone, without its prompt. Nothing but the tokenizer is loaded.

    Examples:
      tokenloom generate my/model --prompts questions.txt -s distortion-free-watermark:key=42 --out answers.jsonl
      tokenloom detect-watermark my/model distortion-free-watermark:key=42 --texts answers.jsonl
    """
    from tokenloom.decode import specs

    try:
        [spec] = specs.parse(watermark)
        found = specs.find(spec, ("detector",))
        specs.parameters(spec, found)
    except ValueError as error:
        raise UsageError(str(error)) from None
    given = _texts(text, texts)
    quiet_libraries(console(stderr=True))
    tokenizer, vocabulary = _tokenizer(model)
    detect = specs.made(spec, found, {"vocabulary": vocabulary})
    shown = table("text", "tokens", "statistic", "p-value")
    for each in given:
        ids = tokenizer.encode(each, add_special_tokens=False)
        head = visible(" ".join(each.split()))
        result = detect(ids)
        shown.add_row(
            Text(head if len(head) <= 60 else head[:59] + "…"), f"{len(ids)}", f"{result.statistic:.2f}",
            f"{result.p_value:.2g}",
        )  # fmt: skip
    console().print(shown)


def _tokenizer(model: str) -> tuple[Any, int]:
    from transformers import AutoConfig, AutoTokenizer

    from tokenloom.policy import loading

    source = loading.resolve(model_source(model))
    return AutoTokenizer.from_pretrained(source), int(AutoConfig.from_pretrained(source).get_text_config().vocab_size)


def _texts(text: str | None, file: Path | None) -> list[str]:
    if (text is None) == (file is None):
        raise UsageError("give a TEXT, or a file of them with --texts; - as the TEXT reads standard input")
    if text is not None:
        found = [sys.stdin.read() if text == "-" else text]
    else:
        assert file is not None
        if not file.is_file():
            raise UsageError(f"there is no file {file}")
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        jsonl = file.suffix.lower() in (".jsonl", ".ndjson")
        found = [_record(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)] if jsonl else lines
    if not found or not all(t.strip() for t in found):
        raise UsageError("there is an empty text, or none at all; a detector needs some tokens")
    return found


def _record(line: str, where: str) -> str:
    try:
        record = json.loads(line)
        found = record.get("response", record.get("text"))
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, str):
        raise UsageError(f'{where}: a line is {{"response": "..."}} or {{"text": "..."}}')
    return found
