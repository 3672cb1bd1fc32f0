"""Clip-Cov: drop a few random tokens with high log-prob-advantage covariance (arXiv 2505.22617).

cov_t = (A_t - mean A) (logprob_t - mean logprob), means over the sampled tokens of the update
Candidates: sampled, not already clipped by PPO, lb < cov < ub. n = max(int(k N), 1) of them, drawn uniformly,
lose their gradient (none for k = 0); N counts the sampled tokens. weights = 0 on the drawn ones, else 1     [B, T]
Means run over the whole update, so the part sees the policy once per update (`refresh`) and any micro-batch
split gives the same gradient; verl takes them per micro-batch. Candidates are listed row by row and the first
n of one permutation are taken, as in verl. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import masked_mean, where_mask
from tokenloom.methods.policy_optimization.ppo_clip import Limit


@part("clip-cov", stage="weight", scope="batch", paper="arXiv:2505.22617", properties={"draws"})
def clip_cov(
    advantages: Tensor,
    logprobs: Tensor,
    ratio: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    lo: Limit = 0.8,
    hi: Limit = 1.2,
    *,
    k: float = 2e-4,
    lb: float = 1.0,
    ub: float = 5.0,
) -> Tensor:
    """Weights [B, T], zero off the mask; at most n sampled tokens get 0.

    Raises:
        ValueError: unless lb < ub and 0 <= k <= 1.
    """
    if not (lb < ub and 0 <= k <= 1):
        raise ValueError(f"clip-cov needs lb < ub and 0 <= k <= 1, got lb={lb}, ub={ub}, k={k}")
    weights = mask.to(logprobs.dtype)
    # Strict, and not at A = 0: a token counts as clipped when the clip changes its loss.
    clipped = ((advantages > 0) & (ratio > hi)) | ((advantages < 0) & (ratio < lo))
    cov = covariance(advantages, logprobs, mask)
    candidates = (mask & ~clipped & (cov > lb) & (cov < ub)).nonzero()
    if len(candidates) == 0 or k == 0:
        return weights
    n = max(int(k * int(mask.sum())), 1)
    order = torch.randperm(len(candidates), generator=generator, device=generator.device).to(mask.device)
    drawn = candidates[order[:n]]
    weights[drawn[:, 0], drawn[:, 1]] = 0
    return weights


def covariance(advantages: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Token-wise contribution to cov(A, logprob) over the mask, detached: [B, T], zero off the mask."""
    a, lp = where_mask(advantages.detach(), mask), where_mask(logprobs.detach(), mask)
    return where_mask((a - masked_mean(a, mask)) * (lp - masked_mean(lp, mask)), mask)


@preset("clip-cov", paper="arXiv:2505.22617")
def clip_cov_preset(*, k: float = 2e-4, lb: float = 1.0, ub: float = 5.0) -> Algorithm:
    """GRPO's advantage, PPO clip and token mean, with Clip-Cov's random removals."""
    return Algorithm.compose(
        advantage="grpo",
        surrogate="ppo-clip",
        aggregate="token-mean",
        weight=[{"part": "clip-cov", "k": k, "lb": lb, "ub": ub}],
    )
