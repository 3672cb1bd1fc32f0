"""Prompts from the command line: one as text, or many from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenloom.cli.guard import UsageError

Prompt = str | list[dict[str, str]]


def chat(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as messages, behind a system message if there is one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ([{"role": "system", "content": system}] if system else []) + messages


def read_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    """The prompt, `-` for standard input, or those of a .jsonl or .txt file.

    Raises:
        UsageError: for both or neither, an empty prompt or file, or a line that is none.
    """
    if (prompt is None) == (file is None):
        raise UsageError("give a PROMPT, or a file of them with --prompts; - as the PROMPT reads standard input")
    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise UsageError("the prompt is empty")
        return [text]
    assert file is not None
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    lines = [x for x in file.read_text(encoding="utf-8-sig").split("\n") if x.strip()]
    if not lines:
        raise UsageError(f"{file} holds no prompts")
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return [x.rstrip("\r") for x in lines]
    return [_record(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)]


def _record(line: str, where: str) -> Prompt:
    from tokenloom.tasks import Item

    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("expected an object")
        item = Item(messages=record.get("messages"), prompt=record.get("prompt"))
    except ValueError as error:
        raise UsageError(f'{where}: {error}; a line is {{"prompt": "..."}} or {{"messages": [...]}}') from None
    return list(item.messages) if item.messages is not None else item.prompt or ""
