"""Items from plain text, `corpus:<file>`: the text so far is the prompt, the next word the answer.

The file is a `.txt`, one document, or a `.jsonl` with an object `{"text": ...}` on each line, found by its path or by
the name of a text shipped with the recipes. Every word with enough words before it makes an item. Metadata:
`tier` (easy, medium, hard), and `document` and `span` (characters), where the answer stands in the file.

The tiers are thirds of the words by how often they occur in the file, the most frequent being easy. The frequency
stands in for the entropy of the base model, which a source cannot ask.
A token budget moves over the run, so the prompt holds the placeholder `{budget}` where it stands (in an `instruction`
of one's own too); `shown` puts the number there when an item is drawn. Words of one document are context of each
other: hold out another file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from tokenloom.tasks.item import Item
from tokenloom.tasks.names import unknown

TIERS = ("easy", "medium", "hard")
PLACEHOLDER = "{budget}"
_LAW = "budget_schedule"
_PARAMS: dict[str, Any] = {
    "context": 400, "min_words": 8, "instruction": None, "budget": None, "decay": 0.2, "min_budget": 1,
}  # fmt: skip
_EXAMPLE = '{"text": "Once upon a time ..."}'


def find(path: str) -> Path:
    """The file at `path`, or the text of that name shipped with the recipes.

    Raises:
        ValueError: when there is neither, or it is no `.txt` and no `.jsonl`.
    """
    if not path.lower().endswith((".txt", ".jsonl")):
        raise ValueError(f"a text is a `.txt` file or a `.jsonl` file with lines such as {_EXAMPLE}, got {path!r}")
    if Path(path).is_file():
        return Path(path)
    shipped = {e.name: Path(str(e)) for e in resources.files("tokenloom.recipes").iterdir() if e.name.endswith(".txt")}
    if path in shipped:
        return shipped[path]
    folder = Path(path).parent
    near = [str(f) for f in sorted(folder.glob("*"))] if folder.is_dir() else []
    raise ValueError(f"{unknown('file', path, [*near, *shipped])} (looked from {Path.cwd()})")


def documents(path: str) -> list[str]:
    """The texts of a file, in its order.

    Raises:
        ValueError: naming file and line, for a missing, malformed or empty file.
    """
    file = find(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = list(_lines(text, path)) if file.suffix.lower() == ".jsonl" else [text]
    found = [t for t in found if t.strip()]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def name_of(document: str) -> str:
    """Names a document by its content, the same for every reader."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check(path: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError for a missing file, or unknown or impossible parameters."""
    for name, value in params.items():
        if name not in _PARAMS:
            raise ValueError(unknown(f"parameter of corpus:{path}", name, tuple(_PARAMS)))
        whole = name in ("context", "min_words", "min_budget")
        if name in ("budget", "instruction") and value is None:
            continue
        if name == "instruction":
            if not isinstance(value, str):
                raise ValueError(f"corpus:{path}: instruction = {value!r}: must be text")
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"corpus:{path}: {name} = {value!r}: must be {kind} above zero")
    chosen = _PARAMS | dict(params)
    if chosen["budget"] is None and (unused := [n for n in ("decay", "min_budget") if n in params]):
        raise ValueError(f"corpus:{path}: {unused} say how a budget moves; give it a budget")
    asked = chosen["instruction"]
    if asked is not None and (PLACEHOLDER in asked) != (chosen["budget"] is not None):
        raise ValueError(f"corpus:{path}: a budget stands in the instruction as {PLACEHOLDER}; give both or neither")
    find(path)
    shown(Item(prompt="", metadata=_law(chosen)), 0.0)


def read(path: str, params: Mapping[str, Any]) -> list[Item]:
    """One item for each word of the file that has `min_words` words before it in its document.

    The prompt shows at most `context` characters before the word. With a `budget` it states the placeholder.

    Raises:
        ValueError: as `check` and `documents`, or when no word has enough words before it.
    """
    check(path, params)
    chosen = _PARAMS | dict(params)
    texts = documents(path)
    words = [list(re.finditer(r"\w+", text)) for text in texts]
    tiers = _tiers(Counter(m.group().lower() for found in words for m in found))
    law = _law(chosen)
    within = f", in about {PLACEHOLDER} tokens," if law else ""
    task = f"Here is the beginning of a text. Think about how it goes on{within} and end with the next word.\n\n"
    task = task if chosen["instruction"] is None else chosen["instruction"]
    items = []
    for text, found in zip(texts, words, strict=True):
        name = name_of(text)
        for match in found[chosen["min_words"] :]:
            before = text[: match.start()].rstrip()[-chosen["context"] :]
            metadata = {"tier": tiers[match.group().lower()], "document": name, "span": list(match.span())}
            items.append(Item(prompt=task + before, answer=match.group(), metadata=metadata | law))
    if not items:
        raise ValueError(f"corpus:{path}: no word has min_words = {chosen['min_words']} words before it")
    return items


def shown(item: Item, progress: float) -> Item:
    """The item as it is drawn at `progress` in [0, 1]: with the budget of that moment in prompt and metadata.

    Items without a moving budget come back as they are.

    Raises:
        ValueError: for an impossible budget.
    """
    law = item.metadata.get(_LAW)
    if law is None:
        return item
    # Imported late: it brings PyTorch, which workers that only verify do without.
    from tokenloom.methods.policy_optimization.rmt import token_budget

    budget = token_budget(progress, **law)
    metadata = {k: v for k, v in item.metadata.items() if k != _LAW} | {"budget": budget}
    if item.messages is None:
        prompt = (item.prompt or "").replace(PLACEHOLDER, str(budget), 1)
        return replace(item, prompt=prompt, metadata=metadata)
    messages = [dict(message) for message in item.messages]
    # The text itself may hold the placeholder; ours is the first in the last user message.
    at = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    messages[at]["content"] = messages[at]["content"].replace(PLACEHOLDER, str(budget), 1)
    return replace(item, messages=tuple(messages), metadata=metadata)


def _law(params: Mapping[str, Any]) -> dict[str, Any]:
    if params["budget"] is None:
        return {}
    return {_LAW: {name: params[name] for name in ("budget", "decay", "min_budget")}}


def _tiers(counts: Counter[str]) -> dict[str, str]:
    """Thirds of all words, repeated ones included, the most frequent first; equal counts go by the alphabet."""
    total, seen, found = sum(counts.values()), 0, {}
    for word, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        found[word] = TIERS[min(len(TIERS) * seen // total, len(TIERS) - 1)]
        seen += count
    return found


def _lines(text: str, path: str) -> Iterator[str]:
    # Split on newlines only: `str.splitlines` would also cut at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}; a line is {_EXAMPLE}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f"{where}: expected an object such as {_EXAMPLE}")
        yield record["text"]
