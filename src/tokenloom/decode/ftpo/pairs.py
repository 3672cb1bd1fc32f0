"""Pairs for FTPO: made of the sampler's corrections, thinned out, and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper

from tokenloom.decode.antislop import Antislop, Correction
from tokenloom.decode.respond import Decoding, respond

# What the sampler of the paper leaves of a law.
_TOP_K, _MIN_P = 50, 0.03


@dataclass(frozen=True)
class Pair:
    """Ids of a context, of the token rejected behind it, and of those that could stand there instead."""

    context: list[int]
    rejected: int
    chosen: list[int]

    def __post_init__(self) -> None:
        if not self.context or not self.chosen or self.rejected in self.chosen:
            raise ValueError("ftpo: a pair needs a context, and chosen tokens among which the rejected one is not")


def pairs_of(corrections: Sequence[Correction], *, least: int = 1) -> list[Pair]:
    """One pair for each rejected token of a correction with `least` chosen tokens or more."""
    return [
        Pair(c.prefix, rejected, [c.chosen, *c.alternatives])
        for c in corrections
        if len(c.alternatives) + 1 >= least
        for rejected in c.rejected
    ]


def balanced(pairs: Sequence[Pair], *, strength: float = 0.8, seed: int = 0) -> list[Pair]:
    """Fewer pairs of the tokens that are rejected most often, in their order, so that few phrases do not fill training.

    Of a token rejected c times, round(c (m / c)^strength) pairs stay, m the median of the counts, where c > m. 0 keeps
    all pairs, 1 as many of each token as the median.

    Raises:
        ValueError: for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"ftpo: strength of balancing lies in [0, 1], got {strength}")
    places: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        places.setdefault(pair.rejected, []).append(i)
    middle = median(len(at) for at in places.values()) if places else 0
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    for at in places.values():
        count = round(len(at) * min(middle / len(at), 1.0) ** strength)
        kept += [at[i] for i in torch.randperm(len(at), generator=generator)[:count].tolist()]
    return [pairs[i] for i in sorted(kept)]


def collect(
    policy: Any, prompts: Sequence[Sequence[int]], loop: Antislop, *,
    copies: int = 1, max_tokens: int = 128, batch: int = 16, least: int = 1, seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Pair]:  # fmt: skip
    """Pairs from `copies` responses of a `Policy` to each prompt (ids), sampled at temperature 1 as in the paper.

    `progress(responses done, in all, pairs so far)` is called after each batch.
    """
    rows = [list(prompt) for prompt in prompts for _ in range(copies)]
    shapers = [TopKLogitsWarper(_TOP_K), MinPLogitsWarper(_MIN_P)]
    found: list[Pair] = []
    for begin in range(0, len(rows), batch):
        some = rows[begin : begin + batch]
        respond(policy, some, Decoding(shapers, loop, max_tokens=max_tokens, batch=batch), seed=seed + begin)
        found += pairs_of(loop.corrections, least=least)
        if progress is not None:
            progress(begin + len(some), len(rows), len(found))
    return found


def write_pairs(pairs: Sequence[Pair], path: str | Path, tokenizer: Any = None) -> None:
    """A line of JSON for each pair; with a tokenizer also the tokens' text, for people."""
    with Path(path).open("w", encoding="utf-8") as file:
        for pair in pairs:
            record: dict[str, Any] = asdict(pair)
            if tokenizer is not None:
                texts = [tokenizer.decode([t]) for t in (pair.rejected, *pair.chosen)]
                record |= {"rejected_text": texts[0], "chosen_texts": texts[1:]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file that `write_pairs` wrote.

    Raises:
        ValueError: for a line that is no pair.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            context, chosen = ([int(t) for t in record[key]] for key in ("context", "chosen"))
            pairs.append(Pair(context, int(record["rejected"]), chosen))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}, line {number}: {error}; a line is {{"context": [ids], "rejected": id, "chosen": [ids]}}'
            ) from None
    return pairs
