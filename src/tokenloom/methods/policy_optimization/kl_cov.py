"""KL-Cov: penalize the change of the tokens with the highest covariance (arXiv 2505.22617).

objective_t = ratio_t A_t, and for the top max(1, int(k N)) tokens by cov_t a loss beta |logprob_t - old_logprob_t|
with cov_t = (A_t - mean A) (logprob_t - mean logprob) over the sampled tokens of the update. No clipping at all.
Composed as surrogate `importance` plus a term whose weights are the selection. Limit: beta = 0 is unclipped
policy gradient. Deviations: none; the covariance's means run over the whole update (verl: micro-batch). Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

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
    """Weights [B, T]: 1 on the max(1, int(k N)) sampled tokens of highest covariance, else 0; k = 0 selects none.

    Raises:
        ValueError: unless 0 <= k <= 1.
    """
    if not 0 <= k <= 1:
        raise ValueError(f"kl-cov/select: k is the fraction of tokens that are penalized, in [0, 1]; got {k}")
    total = int(mask.sum())
    weights = logprobs.new_zeros(mask.numel())
    if total and k:
        cov = where_mask(covariance(advantages, logprobs, mask), mask, float("-inf"))
        weights[cov.reshape(-1).topk(max(1, int(k * total))).indices] = 1
    return weights.reshape(mask.shape)


@preset("kl-cov", paper="arXiv:2505.22617")
def kl_cov_preset(
    *, dialect: Literal["paper", "verl"] = "paper", k: float = 2e-4, coef: float | None = None
) -> Algorithm:
    """GRPO's advantage, unclipped ratio and token mean, with the penalty on the selected tokens.

    `coef=None` takes the dialect's beta: 1 (paper and verl's function) or 0.1 (verl's configuration).
    """
    beta = coef if coef is not None else {"paper": 1.0, "verl": 0.1}[dialect]
    return Algorithm.compose(
        advantage="grpo",
        surrogate="importance",
        aggregate="token-mean",
        terms=[{"part": "kl-cov", "coef": beta, "weight": [{"part": "kl-cov/select", "k": k}]}],
    )
