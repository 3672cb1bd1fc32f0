"""REINFORCE: the score-function gradient with a baseline (Williams 1992, doi 10.1007/BF00992696).

A = R - b, broadcast over the sampled tokens; objective_t = A_t * logprob_t           [B, T], to maximize
The gradient with respect to a log-prob is scale * A exactly, on policy and off.
`running-baseline` keeps b as an exponential mean of past batches; the first batch uses its own mean.
Deviations: none. Unscorable rows (NaN reward) get advantage 0. Fidelity: paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import to_tokens, where_mask
from tokenloom.methods.policy_optimization.importance import where_advantages


@part("reinforce", stage="advantage", scope="row", paper="Williams 1992")
def reinforce(rewards: Tensor, mask: Tensor, *, baseline: float = 0.0) -> Tensor:
    """Advantages [B, T]: reward minus a constant."""
    return to_tokens(_scored(rewards - baseline), mask)


@part("reinforce/running-baseline", stage="advantage", scope="batch", paper="Williams 1992")
def running_baseline(
    rewards: Tensor, mask: Tensor, state: dict[str, float] | None, *, decay: float = 0.9
) -> tuple[Tensor, dict[str, float] | None]:
    """Advantages [B, T] against an exponential mean of earlier batches' rewards, and the new mean as state.

    A batch without any scorable row leaves the state as it was.
    """
    scored = rewards[~rewards.isnan()]
    if scored.numel() == 0:
        return to_tokens(torch.zeros_like(rewards), mask), state
    mean = float(scored.mean())
    baseline = mean if state is None else state["baseline"]
    advantages = to_tokens(_scored(rewards - baseline), mask)
    return advantages, {"baseline": decay * baseline + (1 - decay) * mean}


def _unit_multiplier(ratio: Tensor) -> Tensor:
    return torch.ones_like(ratio)


@part("reinforce/score", stage="surrogate", scope="token", paper="Williams 1992", multiplier=_unit_multiplier)
def score(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Objective [B, T]: A * logprob, no importance ratio."""
    return where_advantages(advantages, mask) * where_mask(logprobs, mask)


def _scored(advantages: Tensor) -> Tensor:
    return torch.where(advantages.isnan(), torch.zeros_like(advantages), advantages)


@preset("reinforce", paper="Williams 1992")
def reinforce_preset(*, running_baseline: bool = True) -> Algorithm:
    """REINFORCE with a running baseline (or none), averaged over the sampled tokens of the batch."""
    return Algorithm.compose(
        advantage="reinforce/running-baseline" if running_baseline else "reinforce",
        surrogate="reinforce/score",
        aggregate="token-mean",
    )
