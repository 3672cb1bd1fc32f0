"""Prompts and texts from the command line: one as it stands, or many from a file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenloom.cli.guard import UsageError

log = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt, and the `id` of its line in a .jsonl file, if it has one."""

    prompt: Prompt
    id: Any = None


def chat(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as messages, behind a system message if there is one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ([{"role": "system", "content": system}] if system else []) + messages


def read_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    """As `read_questions`, the prompts alone."""
    return [q.prompt for q in read_questions(prompt, file)]


def read_questions(prompt: str | None, file: Path | None) -> list[Question]:
    """The prompt, `-` for standard input, or those of a .jsonl or .txt file.

    Raises:
        UsageError: for both or neither, an empty prompt or file, what is no text, or a line that is none.
    """
    if (prompt is None) == (file is None):
        raise UsageError("give a PROMPT, or a file of them with --prompts; - as the PROMPT reads standard input")
    if prompt is not None:
        text = standard_input() if prompt == "-" else prompt
        if not text.strip():
            raise UsageError("the prompt is empty")
        return [Question(checked(text, "the prompt"))]
    assert file is not None
    found = read_lines(file, _question, Question)
    if not found:
        raise UsageError(f"{file} holds no prompts")
    return found


def read_lines(file: Path, of_record: Callable[[Any], T], of_text: Callable[[str], T]) -> list[T]:
    """What `of_record` makes of each JSON line of a .jsonl file, or `of_text` of each line of any other; no blank ones.

    Raises:
        UsageError: without such a file, or for a line that is no JSON, that is no text, or that `of_record` refuses by
            a ValueError; it is named by its number.
    """
    reads_json = file.suffix.lower() in (".jsonl", ".ndjson")
    found = []
    for number, line in enumerate(read_file(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        if not reads_json:
            found.append(of_text(checked(line, where)))
            continue
        try:
            found.append(of_record(json.loads(line)))
        except json.JSONDecodeError as error:
            raise UsageError(f"{where} is no JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: {error}") from None
    return found


def read_file(file: Path) -> str:
    """The text of a file or a pipe, line ends as `\\n`.

    Raises:
        UsageError: when there is none, or it is not UTF-8.
    """
    if not file.exists():
        raise UsageError(f"there is no file {file}")
    if file.is_dir():
        raise UsageError(f"{file} is a folder, not a file")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}, line {line} is no text in UTF-8; save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def standard_input() -> str:
    """All of standard input.

    Raises:
        UsageError: when it is no text.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UsageError(f"standard input is no text in {sys.stdin.encoding}") from None


def checked(text: str, where: str) -> str:
    """`text`, if it is made of whole characters.

    Raises:
        UsageError: otherwise; no tokenizer can read it, and no file hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} has half a character at position {error.start + 1}; write it in UTF-8") from None
    return text


def _question(record: Any) -> Question:
    from tokenloom.tasks import Item

    shape = 'a line is {"prompt": "..."} or {"messages": [...]}, and may have an "id"'
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of an object; {shape}")
    try:
        item = Item(messages=record.get("messages"), prompt=record.get("prompt"))
    except ValueError as error:
        raise ValueError(f"{error}; {shape}") from None
    prompt: Prompt = list(item.messages) if item.messages is not None else item.prompt or ""
    for text in [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]:
        checked(text, "the prompt")
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("the prompt is empty")
    return Question(prompt, record.get("id"))


def encoded(policy: Any, prompts: Sequence[Prompt], *, system: str | None = None, raw: bool = False) -> list[list[int]]:
    """The prompts' ids: as messages, or under `raw` as text to continue.

    Raises:
        UsageError: for a prompt without tokens, or messages that the chat template refuses.
    """
    from jinja2 import TemplateError

    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(policy.encode_prompt(prompt if raw else chat(prompt, system)).tolist())
        except (ValueError, TemplateError) as error:
            where = f"prompt {number}: " if len(prompts) > 1 else ""
            raise UsageError(f"{where}{error}") from None
    return found


def room(policy: Any, ids: Sequence[Sequence[int]], max_tokens: int, *, shorten: bool = False) -> int:
    """`max_tokens`, if the model has positions for that behind every prompt; under `shorten` what it has, if less.

    Raises:
        UsageError: when it has not.
    """
    from tokenloom.rollout.engine import model_positions

    positions = model_positions(policy)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if positions is None or len(ids[longest]) + max_tokens <= positions:
        return max_tokens
    left = positions - len(ids[longest])
    name = f"prompt {longest + 1}" if len(ids) > 1 else "the prompt"
    if left < 1:
        raise UsageError(f"{name} has {len(ids[longest]):,} tokens, and this model reads {positions:,}; shorten it")
    if shorten:
        log.info("%s leaves room for %d tokens; that is the longest response", name, left)
        return left
    raise UsageError(
        f"{name} has {len(ids[longest]):,} tokens, which leaves room for {left:,} of the {positions:,} that this model "
        f"takes; lower --max-tokens to that, or shorten the prompt"
    )
