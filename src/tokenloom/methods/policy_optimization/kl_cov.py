"""KL-Cov: penalize the change of the tokens with the highest covariance (arXiv 2505.22617).

objective_t = ratio_t A_t, and for the top max(1, int(k N)) tokens by cov_t a loss beta |logprob_t - old_logprob_t|
with cov_t = (A_t - mean A) (logprob_t - mean logprob) over the sampled tokens of the update. No clipping at all.
Composed as surrogate `importance` plus a term whose weights are the selection. Limit: beta = 0 is unclipped
policy gradient. Deviations: none; the covariance's means run over the whole update (verl: micro-batch). Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.clip_cov import covariance


@part("kl-cov", stage="term", scope="token", paper="arXiv:2505.22617")
def kl_cov(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """|log_ratio| [B, T], a loss; gradient 0 exactly on policy."""
    return where_mask(log_ratio, mask).abs()


@part("kl-cov/select", stage="weight", scope="batch", paper="arXiv:2505.22617", properties={"breaks-ties"})
def top_covariance(advantages: Tensor, logprobs: Tensor, mask: Tensor, *, k: float = 2e-4) -> Tensor:
    """Weights [B, T]: 1 on the max(1, int(k N)) sampled tokens of highest covariance, else 0."""
    total = int(mask.sum())
    weights = torch.zeros_like(logprobs)
    if total:
        cov = where_mask(covariance(advantages, logprobs, mask), mask, float("-inf"))
        top = cov.reshape(-1).topk(min(max(1, int(k * total)), total)).indices
        weights.view(-1)[top] = 1
    return weights


@preset("kl-cov", paper="arXiv:2505.22617")
def kl_cov_preset(*, k: float = 2e-4, coef: float = 1.0) -> Algorithm:
    """GRPO's advantage, unclipped ratio and token mean, with the penalty on the selected tokens."""
    return Algorithm.compose(
        advantage="grpo",
        surrogate="importance",
        aggregate="token-mean",
        terms=[{"part": "kl-cov", "coef": coef, "weight": [{"part": "kl-cov/select", "k": k}]}],
    )
