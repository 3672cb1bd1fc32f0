"""PPO's clipped surrogate: no gain from leaving the trust interval (arXiv 1707.06347, eq. 7).

objective_t = min(ratio_t A_t, clip(ratio_t, lo, hi) A_t)                            [B, T], to maximize
Deviations: none. Limit: lo -> 0, hi -> inf is `importance`. At ratio 1 the gradient is A. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp
from tokenloom.methods.policy_optimization.importance import where_advantages

Limit = float | Tensor


def clip_multiplier(ratio: Tensor, advantages: Tensor, lo: Limit, hi: Limit) -> Tensor:
    """ratio where the clip lets the gradient through, else 0: [B, T]."""
    blocked = ((advantages > 0) & (ratio > hi)) | ((advantages < 0) & (ratio < lo))
    return torch.where(blocked, torch.zeros_like(ratio), ratio)


@part("ppo-clip", stage="surrogate", scope="token", paper="arXiv:1707.06347", multiplier=clip_multiplier)
def ppo_clip(log_ratio: Tensor, advantages: Tensor, mask: Tensor, lo: Limit = 0.8, hi: Limit = 1.2) -> Tensor:
    """Objective [B, T], zero off the mask. `lo`, `hi` are absolute limits of the ratio, numbers or [B, T].

    >>> one, ratio = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.5, 1.5]])
    >>> ppo_clip(ratio.log(), torch.tensor([[1.0, -1.0]]), one)
    tensor([[ 1.2000, -1.5000]])
    """
    ratio, a = clamped_exp(log_ratio, mask), where_advantages(advantages, mask)
    return torch.minimum(ratio * a, bounded(ratio, lo, hi) * a)


def bounded(ratio: Tensor, lo: Limit, hi: Limit) -> Tensor:
    """`ratio` [B, T] clamped to limits that may be numbers or tensors."""
    if isinstance(lo, Tensor) or isinstance(hi, Tensor):
        low = torch.as_tensor(lo, dtype=ratio.dtype, device=ratio.device)
        return torch.clamp(ratio, low, torch.as_tensor(hi, dtype=ratio.dtype, device=ratio.device))
    return torch.clamp(ratio, lo, hi)


@preset("ppo-clip", paper="arXiv:1707.06347")
def ppo_clip_preset(*, low: float = 0.2, high: float = 0.2, epochs: int = 4, mini_batches: int = 1) -> Algorithm:
    """PPO's surrogate without a critic: whitened returns, several epochs over each batch."""
    return Algorithm.compose(
        advantage="reinforce-pp",
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": low, "high": high},
        aggregate="token-mean",
        updates={"part": "mini-batches", "epochs": epochs, "mini_batches": mini_batches},
    )
