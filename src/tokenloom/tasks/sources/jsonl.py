"""Items of a user's file: one JSON object a line with `prompt` or `messages`, and `answer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenloom.tasks.item import Item
from tokenloom.tasks.names import unknown


def check(path: str) -> None:
    """Raises ValueError unless the file exists."""
    if not Path(path).is_file():
        folder = Path(path).parent
        near = [str(other) for other in sorted(folder.glob("*.jsonl"))] if folder.is_dir() else []
        raise ValueError(f"{unknown('file', path, near)} (looked from {Path.cwd()})")


def read(path: str, fields: Mapping[str, str]) -> list[Item]:
    """The items of a file, in its order; blank lines are skipped.

    `fields` renames columns, such as `{"prompt": "question"}`. What else a line holds becomes the
    item's metadata.

    Raises:
        ValueError: naming file, line and what is wrong with it.
    """
    check(path)
    items: list[Item] = []
    # Split on newlines only: `str.splitlines` would also cut at U+2028 inside a string.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    items.append(_item(line, fields, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not items:
        raise ValueError(f"{path} holds no items; each line is an object such as {_EXAMPLE}")
    return items


_EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'


def _item(line: str, fields: Mapping[str, str], where: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}; a line is {_EXAMPLE}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object such as {_EXAMPLE}, got {type(record).__name__}")
    return item_of_record(record, fields, where)


def item_of_record(record: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Item:
    """The item of one record; `fields` maps prompt, messages and answer to column names.

    Raises:
        ValueError: starting with `where`, when a column is missing, empty or of the wrong type.
    """
    names = {name: fields.get(name, name) for name in ("prompt", "messages", "answer")}
    asked = [name for name in ("prompt", "messages") if name in fields] or ["prompt", "messages"]
    present = [name for name in asked if record.get(names[name]) is not None]
    if len(present) != 1:
        wanted = " or ".join(repr(names[name]) for name in asked)
        if present:
            raise ValueError(f"{where}: has both 'prompt' and 'messages'; keep one of them")
        raise ValueError(f"{where}: needs {wanted}; it has {sorted(map(str, record))}")
    if names["answer"] not in record:
        known = [str(name) for name in record if name != names[present[0]]]
        raise ValueError(f"{where}: {unknown('column', names['answer'], known)}")
    shown = record[names[present[0]]]
    used = {names[present[0]], names["answer"]}
    metadata = {str(name): value for name, value in record.items() if name not in used}
    if present[0] == "prompt":
        if not isinstance(shown, str) or not shown.strip():
            raise ValueError(f"{where}: {names['prompt']!r} must be text that is not blank, got {shown!r:.80}")
        return Item(prompt=shown, answer=record[names["answer"]], metadata=metadata)
    try:
        return Item(messages=shown, answer=record[names["answer"]], metadata=metadata)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
