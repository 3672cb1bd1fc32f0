"""VAPO: a value-based recipe for long reasoning (arXiv 2504.05118).

Policy advantages use lam(l) = clamp(1 - 1 / (alpha l), 0, 1) for a response of l tokens, critic targets lam = 1:
decoupled, length-adaptive GAE. Token mean, clip 0.2 / 0.28, plus mu * NLL of right responses (averaged over their
tokens). For the first `value_pretraining` steps the policy term is switched off, so that the critic is
fitted to Monte-Carlo returns first. Limits: equal lambdas and mu = 0 are PPO.
Deviations: written from knowledge of the paper, not from released code. Fidelity: reconstructed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask, whiten
from tokenloom.methods.policy_optimization.ppo_gae import gae, scored_tokens


@part("vapo", stage="advantage", scope="batch", paper="arXiv:2504.05118", gives=["returns"])
def vapo(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.05,
    gamma: float = 1.0,
    critic_lam: float = 1.0,
    policy_lam: float | None = None,
    whitened: bool = True,
) -> dict[str, Tensor]:
    """`advantages` at the policy's lambda and `returns` at the critic's, both [B, T].

    `policy_lam` fixes lambda for all lengths instead of adapting it. Length counts sampled tokens.
    """
    scored = scored_tokens(token_rewards, mask)
    lam = adaptive_lambda(mask, alpha).to(values)
    if policy_lam is not None:
        lam = torch.full_like(lam, policy_lam)
    advantages = gae(token_rewards, values, scored, gamma, lam)
    targets = gae(token_rewards, values, scored, gamma, torch.full_like(lam, critic_lam))
    returns = where_mask(targets + where_mask(values, mask), mask)
    return {"advantages": whiten(advantages, scored) if whitened else advantages, "returns": returns}


def adaptive_lambda(mask: Tensor, alpha: float = 0.05) -> Tensor:
    """lam(l) = 1 - 1 / (alpha l), clamped to [0, 1]: [B, 1].

    >>> adaptive_lambda(torch.ones(1, 100, dtype=torch.bool))
    tensor([[0.8000]])
    """
    return (1 - 1 / (alpha * mask.sum(-1, keepdim=True).clamp(min=1))).clamp(0, 1)


@part("vapo/value-pretraining", stage="weight", scope="token", paper="arXiv:2504.05118")
def value_pretraining(advantages: Tensor, mask: Tensor, step: int, *, steps: int = 50) -> Tensor:
    """Weights [B, T]: 0 during the first `steps` steps, so that only the critic learns, then 1."""
    return mask.to(advantages.dtype) * float(step >= steps)


@part("vapo/positive-nll", stage="term", scope="token", paper="arXiv:2504.05118")
def positive_nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] in nats, a loss; its weights pick the right responses."""
    return -where_mask(logprobs, mask)


@part("vapo/positive", stage="weight", scope="row", paper="arXiv:2504.05118")
def positive(outcomes: Tensor, mask: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Weights [B, T]: 1 on rows whose verifier reward exceeds the threshold (NaN does not), else 0."""
    return (mask & (outcomes > threshold)[:, None]).to(outcomes.dtype)


@preset("vapo", paper="arXiv:2504.05118")
def vapo_preset(
    *, alpha: float = 0.05, positive_coef: float = 0.1, value_coef: float = 0.5, value_pretraining: int = 50
) -> Algorithm:
    """VAPO: decoupled length-adaptive GAE, clip-higher, positive-example NLL, value pretraining."""
    nll = {"part": "vapo/positive-nll", "coef": positive_coef, "weight": ["vapo/positive"],
           "aggregate": {"part": "token-mean", "count": "weights"}}  # fmt: skip
    warm = [{"part": "vapo/value-pretraining", "steps": value_pretraining}] if value_pretraining else []
    if value_pretraining:
        nll["weight"] = ["vapo/positive", *warm]
    return Algorithm.compose(
        advantage={"part": "vapo", "alpha": alpha},
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": 0.2, "high": 0.28},
        aggregate="token-mean",
        weight=warm,
        terms=[{"part": "ppo-gae/value-loss", "coef": value_coef, "clip": None}, nll],
    )
