"""Beam search: keep the k best prefixes, by summed log-prob (Lowerre 1976; the stopping rules as in transformers).

score(y) = sum_t log p(y_t | y_<t)         of a running beam, nats
final(y) = score(y) / |y|^length_penalty   of a finished one, |y| its new tokens, the end token included

Of all continuations of the running beams the (1 + ends) k best are looked at (2 k at least): those among the k best
that end are finished, the k best that do not end run on. The k best finished ones are kept.

Shapes: k beams, V vocabulary. Limits: k = 1 is greedy; length_penalty = 0 with k as large as the number of strings
gives the most probable string. Deviations: among equals the lowest beam, then the lowest id. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part

EarlyStopping = bool | Literal["never"]


@part("beam-search", stage="search", scope="row", paper="Lowerre, 1976, The Harpy speech recognition system")
def best_continuations(totals: Tensor, *, beams: int = 4) -> Tensor:
    """Indices [k, n] of the n = min(`beams`, V) largest of each row of `totals` [k, V], in falling order.

    Among equals the lowest index comes first.

    Raises:
        ValueError: for less than one beam.
    """
    if beams < 1:
        raise ValueError(f"beam search needs at least one beam, got {beams}")
    count = min(beams, totals.shape[-1])
    least = totals.topk(count, dim=-1).values[:, -1:]
    found = []
    for row, edge in zip(totals, least, strict=True):
        able = (row >= edge).nonzero()[:, 0]
        found.append(able[row[able].argsort(descending=True, stable=True)[:count]])
    return torch.stack(found)


@part("beam-search/final", stage="rank", scope="row", paper="arXiv:1609.08144")
def normalized_score(total: float, length: int, *, length_penalty: float = 1.0) -> float:
    """The score of a finished beam of `length` >= 1 new tokens whose log-probs sum to `total`."""
    return float(total / length**length_penalty)


@part("beam-search/stop", stage="search", scope="row", paper="arXiv:1910.03771")
def may_stop(
    finished: list[float],
    running: float,
    length: int,
    limit: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
) -> bool:
    """Whether running beams of `length` tokens, the best with sum `running`, are given up.

    Never before `beams` are finished, whose final scores are `finished`. Then with `early_stopping` True at once; with
    False when the best, as if it ended here, is no better than the worst finished one; with "never" when it could not
    become better within `limit` tokens by scores that only fall.
    """
    if len(finished) < beams:
        return False
    if early_stopping is True:
        return True
    far = limit if early_stopping == "never" and length_penalty > 0 else length
    return normalized_score(running, far, length_penalty=length_penalty) <= min(finished)
