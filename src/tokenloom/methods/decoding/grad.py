"""GRAD: favor transitions that a small corpus of trusted texts is full of (arXiv 2511.03900).

Graph: one pass over each text c_0 .. c_{n-1} gives scores Z, and E[c_i, c_{i+1}] += max(Z_i[c_{i+1}], 0).
Decoding, with g = E[last token, .]: on the tokens that g leads to,
z' = (1 - lambda) z + lambda (low + (g / max g) (high - low)),   lambda = lambda_max (1 - max p)             [B, V]
and z elsewhere; a last token without edges changes nothing. Limits: lambda_max = 0 changes nothing; E of two corpora is
the sum of theirs, in any order.
low and high are what scale="range" takes as the range of the model's finite scores, so that a constant added to all
scores changes nothing. scale="max" has low = 0, which is right for scores that are mostly positive and turns the graph
upside down where all are negative, as log-probs are. adaptive=False has lambda = lambda_max.
Deviations: unknown. Fidelity: reconstructed: the graph as summarized, the fusion from "max-normalized" and "adaptively
fused" alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("grad", stage="shape", scope="row", paper="arXiv:2511.03900")
def grad(
    scores: Tensor,
    edges: Tensor,
    *,
    lambda_max: float = 0.5,
    adaptive: bool = True,
    scale: Literal["range", "max"] = "range",
) -> Tensor:
    """Scores [B, V] from the model's and the weights `edges` [B, V] >= 0 of the last token's transitions.

    Raises:
        ValueError: for lambda_max outside [0, 1].
    """
    if not 0 <= lambda_max <= 1:
        raise ValueError(f"grad: lambda_max is a share of the graph in [0, 1], got {lambda_max}")
    possible = scores > -torch.inf
    high = scores.amax(-1, keepdim=True)
    low = (
        scores.masked_fill(~possible, torch.inf).amin(-1, keepdim=True) if scale == "range" else torch.zeros_like(high)
    )
    largest = edges.amax(-1, keepdim=True)
    evidence = edges / torch.where(largest > 0, largest, 1.0)
    share = lambda_max * (1 - scores.softmax(-1).amax(-1, keepdim=True)) if adaptive else lambda_max
    fused = (1 - share) * scores + share * (low + evidence * (high - low))
    return torch.where((edges > 0) & possible, fused, scores)


@part("grad/edges", stage="analysis", scope="row", paper="arXiv:2511.03900")
def transition_edges(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Edges [m, 2] of a text `ids` [n], each once, and their weights [m] from the model's `scores` [n, V] after each.

    Transitions that the model scores below 0 have no weight and no edge.
    """
    pairs = torch.stack((ids[:-1], ids[1:]), -1)
    weights = scores[:-1].gather(-1, ids[1:, None]).squeeze(-1).clamp(min=0)
    distinct, which = torch.unique(pairs[weights > 0], dim=0, return_inverse=True)
    summed = torch.zeros(len(distinct), dtype=torch.float64, device=scores.device)
    return distinct, summed.index_add(0, which, weights[weights > 0].double())
