"""Unclipped importance sampling: the surrogate that clipping bounds (Kakade & Langford 2002; arXiv 1502.05477).

objective_t = ratio_t * A_t                                                          [B, T], to maximize
Limit of PPO's clip for infinite bounds. Fidelity: paper.
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import clamped_exp, where_mask


def _multiplier(ratio: Tensor) -> Tensor:
    return ratio


@part("importance", stage="surrogate", scope="token", paper="arXiv:1502.05477", multiplier=_multiplier)
def importance(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Objective [B, T] with gradient ratio * A, zero off the mask."""
    return clamped_exp(log_ratio, mask) * where_advantages(advantages, mask)


def where_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages without gradient, zero off the mask: [B, T]."""
    return where_mask(advantages.detach(), mask)
