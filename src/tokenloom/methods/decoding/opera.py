"""OPERA: beam search that distrusts tokens which everything after them looks at (arXiv 2311.17911).

For a candidate token: the last layer's attention, its maximum over heads, each row normalized over the whole context,
then the block A [w, w] of the response, rows = queries, the last one the candidate's.
    log phi_c = sum_{i >= c} log(sigma A_ic) - log 1e7,   penalty = max_c phi_c,   c* = its column
    candidate score = logit - alpha penalty; for the first 10 tokens penalty = -(attention to the context's span)
Retrospection: when one column c >= 10 was c* more than r times in every beam, go back to token c + 1 and exclude what
was chosen there; after N_can returns to one place, to the one before.

In the paper the span is an image; for text it is any part of the prompt. Limits: alpha = 0 without retrospection is
beam search over the N_can best tokens of each beam. Deviations: products in logs, phi capped at e^600 so that scores
stay finite; other tokens are 999 below the least candidate, not at -999, where large penalties would let them pass.
Fidelity: code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2311.17911"
EARLY = 10
"""Response tokens before which columns say nothing; retrospection never goes to one of them."""
_LOG_UNIT = math.log(1e7)
_LARGEST = 600.0
_BELOW = 999.0


@part("opera", stage="search", scope="row", paper=PAPER)
def over_trust(attention: Tensor, *, scale: float = 50.0) -> tuple[Tensor, Tensor]:
    """log of max_c phi_c [...] and c* [...] of blocks [..., w, w]; what is above the diagonal is not read."""
    w = attention.shape[-1]
    below = torch.ones(w, w, dtype=torch.bool, device=attention.device).tril()
    logs = torch.where(below, (scale * attention.double()).log(), 0.0).sum(-2) - _LOG_UNIT
    best = logs.max(-1)
    return best.values, best.indices


@part("opera/candidates", stage="shape", scope="row", paper=PAPER)
def candidate_scores(scores: Tensor, candidates: Tensor, penalties: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Scores [B, V]: of `candidates` [B, C] theirs less alpha `penalties` [B, C], of others 999 below the least."""
    kept = scores.gather(-1, candidates) - alpha * penalties
    others = kept.min(-1, keepdim=True).values.clamp(max=0.0) - _BELOW
    return others.expand_as(scores).scatter(-1, candidates, kept)


@part("opera/penalty", stage="analysis", scope="row", paper=PAPER)
def penalty(log_trust: Tensor, span_attention: Tensor, length: int) -> Tensor:
    """Penalties [...] of candidates for response token `length` (from 0), given both kinds of evidence [...]."""
    return -span_attention.double() if length < EARLY else log_trust.clamp(max=_LARGEST).exp()


@part("opera/return", stage="search", scope="batch", paper=PAPER)
def return_to(
    columns: Sequence[Sequence[int]], returns: dict[int, int], *, patience: int = 15, most_returns: int = 5
) -> int | None:
    """The column to go back behind, or None. `columns` has c* of every step of each beam, `returns` how often it was
    gone back behind each column."""
    common = set(columns[0]).intersection(*columns[1:]) if columns else set()
    over = [c for c in common if c >= EARLY and all(list(beam).count(c) > patience for beam in columns)]
    if not over:
        return None
    found = max(over, key=lambda c: (sum(list(beam).count(c) for beam in columns), -c))
    while found >= EARLY and returns.get(found, 0) >= most_returns:
        found -= 1
    return found if found >= EARLY else None
