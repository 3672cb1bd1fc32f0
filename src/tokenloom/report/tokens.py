"""Which dumped responses a report embeds, read from `tokens.jsonl` in two passes.

The file may be far larger than memory or than a page should be, so the first pass keeps only
(step, row, group, reward, length, offset) of each line and the second reads the chosen lines.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenloom.report.jsonl import number, parse_object, read_objects
from tokenloom.report.text import prompt_text, shorten

MAX_RESPONSES = 2_000
MAX_STEPS = 40
MAX_TOKENS = 1_050_000
MAX_TOKENS_PER_RESPONSE = 4_096
MAX_PIECE = 200
_CORE = ("advantage", "coefficient", "weight", "entropy", "log_ratio", "reference_kl", "probability", "logprob")

T = TypeVar("T")


@dataclass(frozen=True)
class TokenRow:
    """One response of L tokens: `ids`, `pieces`, `mask` and each quantity have L entries, None or NaN if unknown.

    `omitted` counts tokens of the response beyond `MAX_TOKENS_PER_RESPONSE`; `stored` names the folder of its batch
    within the run, "" when there is none.
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
    quantities: dict[str, array[float]]
    omitted: int = 0
    stored: str = ""


@dataclass(frozen=True)
class TokenDump:
    """The chosen responses, ordered by step, group and row, out of `total` responses at `steps` steps.

    `mismatch` holds, of each dumped step over all its sampled tokens, the mean size of the log-ratio between trainer
    and sampler, and the effective sample size (sum w)^2 / (n sum w^2) of their ratios w as a fraction.
    """

    rows: tuple[TokenRow, ...] = ()
    total: int = 0
    steps: int = 0
    step_numbers: tuple[int, ...] = ()
    mismatch: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    step: int
    row: int
    group: int | None
    reward: float | None
    length: int
    offset: int


def read_tokens(
    path: Path, notes: list[str], *, max_responses: int = MAX_RESPONSES, step: int | None = None
) -> TokenDump:
    """Read at most `max_responses` responses and `MAX_TOKENS` tokens of `path`; see `choose` for which.

    With `step` only those of that step are read; -1 is the last one dumped.
    """
    entries: dict[tuple[int, int], _Entry] = {}
    ratios: dict[tuple[int, int], list[float]] = {}
    for count, (offset, line) in enumerate(read_objects(path, notes, "there is no token map")):
        at, row = number(line.get("step")), number(line.get("row"))
        group = number(line.get("group"))
        entry = _Entry(
            step=int(at or 0),
            row=count if row is None else int(row),
            group=None if group is None else int(group),
            reward=number(line.get("reward")),
            length=min(max(len(_list(line, "pieces")), len(_list(line, "ids"))), MAX_TOKENS_PER_RESPONSE),
            offset=offset,
        )
        # A resumed run writes the steps after its checkpoint again: the last writing counts.
        entries[entry.step, entry.row] = entry
        ratios[entry.step, entry.row] = _log_ratios(line)
    steps = sorted({e.step for e in entries.values()})
    wanted = steps[-1] if step == -1 and steps else step
    chosen = choose([e for e in entries.values() if wanted is None or e.step == wanted], max_responses)
    rows: list[TokenRow] = []
    if chosen:
        with path.open("rb") as file:
            for entry in chosen:
                file.seek(entry.offset)
                rows.append(_token_row(entry, parse_object(file.readline()) or {}))
    return TokenDump(tuple(rows), len(entries), len(steps), tuple(steps), _mismatch(ratios))


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


def _log_ratios(line: dict[str, Any]) -> list[float]:
    """Four sums over the sampled tokens of a row: their count, |log w|, w and w squared."""
    quantities = line.get("quantities")
    values = quantities.get("log_ratio") if isinstance(quantities, dict) else None
    sums = [0.0, 0.0, 0.0, 0.0]
    if isinstance(values, list):
        for value, sampled in zip(values, _padded(_list(line, "mask"), len(values), True), strict=True):
            # Beyond 50 a ratio is no measurement any more, and its square would soon be none that a float can hold.
            if sampled and (x := number(value)) is not None and abs(x) < 50:
                w = math.exp(x)
                sums = [a + b for a, b in zip(sums, (1.0, abs(x), w, w * w), strict=True)]
    return sums


def _mismatch(ratios: dict[tuple[int, int], list[float]]) -> dict[int, tuple[float, float]]:
    steps: dict[int, list[float]] = {}
    for (step, _), sums in ratios.items():
        steps[step] = [a + b for a, b in zip(steps.get(step, [0.0] * 4), sums, strict=True)]
    return {step: (size / n, w * w / (n * ww)) for step, (n, size, w, ww) in sorted(steps.items()) if n}


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
        quantities=_quantities(quantities if isinstance(quantities, dict) else {}, n),
        omitted=full - n,
        stored=_stored(line.get("stored")),
    )


def _quantities(told: dict[str, Any], n: int) -> dict[str, array[float]]:
    """What was dumped, the usual quantities first, and the probability that the log-prob stands for."""
    found = {
        str(name): array("f", _padded([_single(v) for v in values], n, math.nan))
        for name, values in told.items()
        if isinstance(values, list)
    }
    if "logprob" in found:
        found["probability"] = array("f", (math.exp(min(v, 0.0)) if v == v else v for v in found["logprob"]))
    return {k: found[k] for k in (*_CORE, *sorted(found.keys() - set(_CORE))) if k in found}


def _single(value: Any) -> float:
    """A number that fits single precision, NaN for everything else."""
    known = number(value)
    return known if known is not None and abs(known) < 3.4e38 else math.nan


def _stored(value: Any) -> str:
    """A folder inside the run; a path that leads elsewhere is none."""
    text = value if isinstance(value, str) else ""
    return text if re.fullmatch(r"tokens/step-\d{6,12}", text) else ""


def _list(line: dict[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    return value if isinstance(value, list) else []


def _padded(values: list[T], n: int, fill: T) -> list[T]:
    return values[:n] + [fill] * (n - len(values))
