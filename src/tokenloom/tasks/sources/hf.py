"""Items of a Hugging Face data set: `hf:<dataset>`, by hub name or local folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenloom.tasks.item import Item
from tokenloom.tasks.names import unknown
from tokenloom.tasks.sources.jsonl import item_of_record

PARAMS = ("name", "revision", "data_dir", "data_files")

_PROMPTS = ("prompt", "messages", "question", "problem", "instruction", "input")
_ANSWERS = ("answer", "solution", "target", "label", "output", "response")


def check(name: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError for parameters that `load_dataset` is not given."""
    for key in params:
        if key not in PARAMS:
            raise ValueError(unknown(f"parameter of hf:{name}", key, PARAMS))


def read(name: str, params: Mapping[str, Any], split: str, fields: Mapping[str, str]) -> list[Item]:
    """The items of one split, in its order.

    Columns not named by `fields` are found by their usual names (prompt, messages, question,
    problem, ...; answer, solution, target, ...). Code of the data set is never run.

    Raises:
        ValueError: when the data set cannot be loaded, or a column is missing.
    """
    check(name, params)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("an `hf:` source needs the package datasets: pip install datasets") from error
    try:
        rows = load_dataset(name, split=split, **params)
    except Exception as error:  # the hub, the network and the file format all raise their own types
        raise ValueError(f"hf:{name} (split {split!r}) cannot be loaded: {type(error).__name__}: {error}") from error
    chosen = _chosen_fields(list(rows.column_names), fields, f"hf:{name}")
    return [
        item_of_record(_plain(row), chosen, f"hf:{name}, split {split!r}, row {index}")
        for index, row in enumerate(rows)
    ]


def _chosen_fields(columns: list[str], fields: Mapping[str, str], where: str) -> dict[str, str]:
    chosen = dict(fields)
    for column in chosen.values():
        if column not in columns:
            raise ValueError(f"{where}: {unknown('column', column, columns)}")
    if "prompt" not in chosen and "messages" not in chosen:
        column = _first(_PROMPTS, columns, where, "prompt")
        chosen["messages" if column == "messages" else "prompt"] = column
    if "answer" not in chosen:
        chosen["answer"] = _first(_ANSWERS, columns, where, "answer")
    return chosen


def _first(usual: tuple[str, ...], columns: list[str], where: str, name: str) -> str:
    for column in usual:
        if column in columns:
            return column
    raise ValueError(f"{where}: no column looks like the {name}; name it with `fields: {{{name}: ...}}` from {columns}")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose dates, bytes and images are text, as items must be JSON-able."""
    return dict(json.loads(json.dumps(dict(row), default=str)))
