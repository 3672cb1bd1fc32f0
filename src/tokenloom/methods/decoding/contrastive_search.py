"""Contrastive search: a probable token whose state is unlike those before it (arXiv 2202.06417).

score(v) = (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

over the k most probable tokens v; h_v is the last hidden state of v at the next position, h_j those of all tokens
before it, the prompt's included. The token of the largest score is taken, the more probable one among equals.

Shapes: B rows, k candidates, S tokens of the longest row, D hidden size. Limits: alpha = 0 and k = 1 are greedy.
Deviations: none. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("contrastive-search", stage="choose", scope="row", paper="arXiv:2202.06417")
def contrastive_scores(probs: Tensor, similarity: Tensor, *, alpha: float = 0.6) -> Tensor:
    """Scores [B, k] of candidates with `probs` [B, k] whose largest cosine with a state before is `similarity` [B, k].

    Impossible candidates (probability 0) get -inf.

    Raises:
        ValueError: unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"contrastive-search: alpha = {alpha}; it weighs likeness against probability, in [0, 1]")
    return ((1 - alpha) * probs - alpha * similarity).masked_fill(probs == 0, -torch.inf)


@part("contrastive-search/similarity", stage="search", scope="row", paper="arXiv:2202.06417")
def largest_cosine(candidates: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """The largest cosine [B, k] of `candidates` [B, k, D] with the states `context` [B, S, D] where `mask` [B, S]."""
    ahead = torch.nn.functional.normalize(candidates, dim=-1)
    behind = torch.nn.functional.normalize(context, dim=-1)
    cosines = ahead @ behind.transpose(1, 2)
    return cosines.masked_fill(~mask[:, None], -torch.inf).max(-1).values
