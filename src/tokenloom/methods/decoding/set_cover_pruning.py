"""Confidence-weighted set cover: drop parallel hypotheses that say nothing new (arXiv 2508.03979).

S_i   token types of hypothesis i;    U = union of all S_i;    c_i = exp(mean log-prob of its tokens)
pick  repeatedly the hypothesis of the largest c_i |S_i \\ covered|, the first among equals, until rho |U| types are
      covered and `survivors` are kept; when nothing new is left, the most confident

This is the greedy set cover of weights 1 / c_i, within 1 + ln |U| of the least weight. Limits: rho = 1 keeps all
types; rho = 0 keeps one hypothesis; without pruning it is self-consistency. Deviations: the paper's abstract leaves
weights and threshold open; both are ours. Fidelity: reconstructed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("set-cover-pruning", stage="search", scope="group", paper="arXiv:2508.03979")
def set_cover(types: Tensor, confidence: Tensor, *, coverage: float = 0.95, survivors: int = 1) -> Tensor:
    """Which hypotheses stay, bool [N].

    Args:
        types: bool [N, U], whether hypothesis i has the type u.
        confidence: [N], above 0.
        coverage: the share of all types that those who stay must have.
        survivors: the least number that stays (all, if there are fewer).

    Raises:
        ValueError: for a coverage outside [0, 1], survivors < 1, or a confidence not above 0.
    """
    if not 0 <= coverage <= 1 or survivors < 1:
        raise ValueError(
            f"set-cover-pruning: coverage is a share in [0, 1] and survivors at least 1; got {coverage}, {survivors}"
        )
    if not bool((confidence > 0).all()):
        raise ValueError(f"set-cover-pruning: confidences must be above 0, got {confidence}")
    confidence = confidence.double()
    keep = torch.zeros(len(types), dtype=torch.bool)
    covered = torch.zeros(types.shape[1], dtype=torch.bool)
    # A share that rounds above a whole number of types must not ask for one more.
    needed = coverage * int(types.any(0).sum()) - 1e-9
    while not bool(keep.all()) and (int(covered.sum()) < needed or int(keep.sum()) < survivors):
        gains = confidence * (types & ~covered).sum(-1)
        worth = gains if bool((gains[~keep] > 0).any()) else confidence
        pick = max((i for i in range(len(types)) if not keep[i]), key=lambda i: float(worth[i]))
        keep[pick] = True
        covered |= types[pick]
    return keep
