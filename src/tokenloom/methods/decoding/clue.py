"""CLUE: judge a reasoning trace by the nearest centroid of hidden-state changes (arXiv 2510.01591).

Delta = h_end - h_start              [L, D]: hidden states after every layer, where thinking ends minus where it starts
C+, C- = mean of Delta over correct and over incorrect traces of the past                                       [L, D]
d(A, B) = (1/L) sum_l ||A_l - B_l||_2
score = d(Delta, C-) - d(Delta, C+): correct if above 0. Candidates are ranked by ascending d(Delta, C+); the answer is
that of the first, or the majority among the first m.

All sums in float32 at least. Limits: m = 1 is the nearest candidate, m = N the plain majority. Deviations: none known;
the layer average of the distance is our reading of the paper. Fidelity: paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("clue", stage="rank", scope="row", paper="arXiv:2510.01591")
def clue(deltas: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Scores [N] of `deltas` [N, L, D] with centroids [L, D]: above 0 is judged correct."""
    return distance(deltas, negative) - distance(deltas, positive)


@part("clue/closeness", stage="rank", scope="row", paper="arXiv:2510.01591")
def closeness(deltas: Tensor, positive: Tensor) -> Tensor:
    """Scores [N] that rank candidates: minus the distance of `deltas` [N, L, D] to the centroid of the correct."""
    return -distance(deltas, positive)


def distance(deltas: Tensor, centroid: Tensor) -> Tensor:
    """The mean over layers of the Euclidean distance, [N]; `deltas` [N, L, D], `centroid` [L, D].

    Raises:
        ValueError: for other shapes.
    """
    if deltas.ndim != 3 or deltas.shape[1:] != centroid.shape:
        raise ValueError(
            f"clue compares [N, L, D] with [L, D], got {tuple(deltas.shape)} and {tuple(centroid.shape)}; centroids "
            "belong to the model they were collected with"
        )
    wide = torch.promote_types(torch.promote_types(deltas.dtype, centroid.dtype), torch.float32)
    distances: Tensor = torch.linalg.vector_norm(deltas.to(wide) - centroid.to(wide), dim=-1)
    return distances.mean(-1)


@part("clue/centroids", stage="probe", scope="batch", paper="arXiv:2510.01591")
def centroids(deltas: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """The centroids (C+, C-), each [L, D], of `deltas` [n, L, D] labeled by `correct` [n] bool.

    Raises:
        ValueError: when one of the classes is empty.
    """
    right = correct.to(torch.bool)
    if not bool(right.any()) or bool(right.all()):
        raise ValueError(
            f"clue needs correct and incorrect traces, got {int(right.sum())} correct of {len(right)}; add experience "
            "of the other kind, or sample at a higher temperature"
        )
    wide = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    return wide[right].mean(0), wide[~right].mean(0)
