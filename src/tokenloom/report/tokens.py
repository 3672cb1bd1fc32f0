"""Which dumped responses a report embeds, read from `tokens.jsonl` in two passes.

The file may be far larger than memory or than a page should be, so the first pass keeps only
(step, row, group, reward, length, offset) of each line and the second reads the chosen lines.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenloom.report.jsonl import number, parse_object, read_objects
from tokenloom.report.text import prompt_text, shorten

MAX_RESPONSES = 240
MAX_STEPS = 40
MAX_TOKENS = 50_000
MAX_TOKENS_PER_RESPONSE = 1_500
MAX_PIECE = 200

T = TypeVar("T")


@dataclass(frozen=True)
class TokenRow:
    """One response of L tokens: `ids`, `pieces`, `mask` and each quantity have L entries, None if unknown.

    `omitted` counts tokens of the response beyond `MAX_TOKENS_PER_RESPONSE`.
    """

    step: int
    row: int
    group: int | None
    prompt: str
    answer: str | None
    reward: float | None
    ids: list[int | None]
    pieces: list[str]
    mask: list[bool]
    quantities: dict[str, list[float | None]]
    omitted: int = 0


@dataclass(frozen=True)
class TokenDump:
    """The chosen responses, ordered by step, group and row, out of `total` responses at `steps` steps."""

    rows: tuple[TokenRow, ...] = ()
    total: int = 0
    steps: int = 0


@dataclass(frozen=True)
class _Entry:
    step: int
    row: int
    group: int | None
    reward: float | None
    length: int
    offset: int


def read_tokens(path: Path, notes: list[str], *, max_responses: int = MAX_RESPONSES) -> TokenDump:
    """Read at most `max_responses` responses and `MAX_TOKENS` tokens of `path`; see `choose` for which."""
    entries: dict[tuple[int, int], _Entry] = {}
    for count, (offset, line) in enumerate(read_objects(path, notes, "there is no token map")):
        step, row = number(line.get("step")), number(line.get("row"))
        group = number(line.get("group"))
        entry = _Entry(
            step=int(step or 0),
            row=count if row is None else int(row),
            group=None if group is None else int(group),
            reward=number(line.get("reward")),
            length=min(max(len(_list(line, "pieces")), len(_list(line, "ids"))), MAX_TOKENS_PER_RESPONSE),
            offset=offset,
        )
        # A resumed run writes the steps after its checkpoint again: the last writing counts.
        entries[entry.step, entry.row] = entry
    chosen = choose(list(entries.values()), max_responses)
    rows: list[TokenRow] = []
    if chosen:
        with path.open("rb") as file:
            for entry in chosen:
                file.seek(entry.offset)
                rows.append(_token_row(entry, parse_object(file.readline()) or {}))
    steps = len({e.step for e in entries.values()})
    return TokenDump(tuple(rows), total=len(entries), steps=steps)


def choose(entries: list[_Entry], max_responses: int) -> list[_Entry]:
    """Spread the budget over evenly spaced steps; within a step take whole groups, mixed rewards first."""
    by_step: dict[int, list[_Entry]] = defaultdict(list)
    for entry in entries:
        by_step[entry.step].append(entry)
    steps = spread(sorted(by_step), min(MAX_STEPS, max(1, max_responses)))
    queues = [_informative_first(by_step[step]) for step in steps]
    chosen: list[_Entry] = []
    tokens = 0
    for rank in range(max((len(q) for q in queues), default=0)):
        for queue in queues:
            if rank >= len(queue):
                continue
            entry = queue[rank]
            if len(chosen) == max_responses or (chosen and tokens + entry.length > MAX_TOKENS):
                break
            chosen.append(entry)
            tokens += entry.length
    return sorted(chosen, key=lambda e: (e.step, -1 if e.group is None else e.group, e.row))


def spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the sorted `values`, evenly spaced from first to last (the last if count is 1)."""
    if len(values) <= count:
        return values
    if count == 1:
        return values[-1:]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _informative_first(entries: list[_Entry]) -> list[_Entry]:
    groups: dict[int | None, list[_Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.group].append(entry)

    def reward_range(members: list[_Entry]) -> float:
        rewards = [e.reward for e in members if e.reward is not None]
        return max(rewards) - min(rewards) if rewards else 0.0

    ordered = sorted(groups.values(), key=lambda g: (-reward_range(g), min(e.row for e in g)))
    return [e for members in ordered for e in sorted(members, key=lambda e: e.row)]


def _token_row(entry: _Entry, line: dict[str, Any]) -> TokenRow:
    ids, pieces, mask = _list(line, "ids"), _list(line, "pieces"), _list(line, "mask")
    full = max(len(pieces), len(ids))
    n = min(full, MAX_TOKENS_PER_RESPONSE)
    texts = [str(p) for p in pieces[:n]] + [f"<{i}>" for i in ids[len(pieces) : n]]
    quantities = line.get("quantities")
    answer = line.get("answer")
    return TokenRow(
        step=entry.step,
        row=entry.row,
        group=entry.group,
        prompt=prompt_text(line.get("prompt")),
        answer=None if answer is None else shorten(str(answer), MAX_PIECE),
        reward=entry.reward,
        ids=_padded([i if isinstance(i, int) else None for i in ids], n, None),
        pieces=[shorten(t, MAX_PIECE) for t in texts],
        mask=_padded([bool(m) for m in mask], n, True),
        quantities={
            str(name): _padded([number(v) for v in values], n, None)
            for name, values in (quantities.items() if isinstance(quantities, dict) else ())
            if isinstance(values, list)
        },
        omitted=full - n,
    )


def _list(line: dict[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    return value if isinstance(value, list) else []


def _padded(values: list[T], n: int, fill: T) -> list[T]:
    return values[:n] + [fill] * (n - len(values))
