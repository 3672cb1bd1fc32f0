"""Entropy bonus: reward the policy for staying undecided (Williams & Peng 1991; arXiv 1602.01783).

loss_t = -H_t, the entropy of the next-token distribution in nats                      [B, T]
Deviations: none. Fidelity: paper.
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import where_mask


@part("entropy-bonus", stage="term", scope="token", paper="arXiv:1602.01783")
def entropy_bonus(entropies: Tensor, mask: Tensor) -> Tensor:
    """Negative entropy [B, T], a loss with gradient through the entropies, zero off the mask."""
    return -where_mask(entropies, mask)
