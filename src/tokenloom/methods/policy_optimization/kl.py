"""KL to a frozen reference: per-token estimators in the loss or in the reward, and the exact sum over the vocabulary.

With x = ref_logprobs - logprobs (Schulman 2020, "Approximating KL divergence"):
k1 = -x        unbiased, can be negative; as a loss its expected gradient on policy is zero, so it belongs in rewards
k2 = x^2 / 2   biased, its gradient is that of the reverse KL on policy
k3 = e^x - x - 1   unbiased, never negative; its gradient is the forward KL's on policy
k3+ = the value of k3 with the gradient of k2
value_limit clamps the estimate from both sides with zero gradient outside (verl: 10). exponent_limit clamps x
from above before k3 (numerical guard, 20), so that the gradient is zero there and neither explodes nor turns its
sign; below, k3 needs no guard. times_ratio multiplies the estimate by the gradient-carrying ratio (TRL's
`use_bias_correction_kl`). `kl/full` sums pi log(pi / ref) over the vocabulary inside a chunk. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import clamped_exp, masked_sum, where_mask
from tokenloom.signals import chunk_signal

Estimator = Literal["k1", "k2", "k3", "k3+"]


@part("kl", stage="term", scope="token", paper="arXiv:2402.03300")
def kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    log_ratio: Tensor | None = None,
    *,
    estimator: Estimator = "k3",
    value_limit: float | None = None,
    exponent_limit: float = 20.0,
    times_ratio: bool = False,
) -> Tensor:
    """Estimate [B, T] of KL(policy || reference) in nats, a loss; zero off the mask.

    Raises:
        ValueError: for `times_ratio` without a log-ratio.

    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> kl(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), one)
    tensor([[0.1065]])
    """
    value = estimate(logprobs, ref_logprobs, mask, estimator, exponent_limit)
    if value_limit is not None:
        value = value.clamp(-value_limit, value_limit)
    if times_ratio:
        if log_ratio is None:
            raise ValueError("times_ratio multiplies by the importance ratio, but log_ratio is not given")
        value = value * clamped_exp(log_ratio, mask)
    return value


@part("kl/in-reward", stage="reward", scope="token", paper="arXiv:2203.02155")
def kl_in_reward(
    rewards: Tensor,
    token_rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    coef: float = 0.05,
    estimator: Estimator = "k1",
    per: Literal["token", "row"] = "token",
) -> Tensor:
    """Rewards minus coef * estimate: token rewards [B, T], or with per="row" the outcome minus the row's sum [B].

    Both spread the same penalty; the row form keeps it out of the token-level credit, as TRL's RLOO does.
    """
    penalty = coef * estimate(old_logprobs, ref_logprobs, mask, estimator)
    if per == "row":
        return rewards - masked_sum(penalty, mask, -1)
    return where_mask(token_rewards - penalty, mask)


@chunk_signal("full_ref_kl", "logits", "ref_logits")
def full_ref_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, [N, V] and [N, V] -> [N] nats."""
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs = logprobs.exp()
    # A token that both laws exclude (logit -inf) would give 0 * (inf - inf).
    return (probs * torch.where(probs > 0, logprobs - ref, torch.zeros_like(probs))).sum(-1)


@part("kl/full", stage="term", scope="token", paper="arXiv:1909.08593")
def kl_full(full_ref_kl: Tensor, mask: Tensor) -> Tensor:
    """Exact KL(policy || reference) of each next-token distribution [B, T] in nats, a loss."""
    return where_mask(full_ref_kl, mask)


def estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator, exponent_limit: float = 20.0
) -> Tensor:
    """One of the estimators [B, T], with gradient through `logprobs`, zero off the mask."""
    x = where_mask(ref_logprobs.detach(), mask) - where_mask(logprobs, mask)
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x**2 / 2
    clamped = x.clamp(max=exponent_limit)
    k3 = clamped.exp() - clamped - 1
    if estimator == "k3":
        return k3
    k2 = x**2 / 2
    return k3.detach() + k2 - k2.detach()
