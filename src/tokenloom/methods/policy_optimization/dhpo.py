"""DHPO: token and sequence ratios are clipped apart and mixed (arXiv 2601.05607).

r_t = token ratio, s_t = the row's length-normalized ratio with token t's gradient (GSPO-token)
objective_t = w min(r A, clip(r, lo, hi) A) + (1 - w) min(s A, clip(s, 1 - low, 1 + high) A)   [B, T], to maximize
w = 1/2, or by entropy: w_t = sg(H_t / max of the row), more of the token ratio where the policy is unsure.
joint=True mixes first and takes one minimum, min(m A, m' A) with m = w r + (1 - w) s and m' of the clipped ratios;
the two agree unless one branch is inside its interval and the other outside, where one could make up for the other.

Deviations: the paper's formula was not at hand. Its abstract fixes the mixture of ratios, the clip of each branch
before mixing, and the two ways to mix; the minimum per branch, the normalization of the entropy (a row without
entropy takes the sequence ratio) and the bounds (those of the parent methods) are ours. Limits: w = 1 is GRPO's
clip, w = 0 is GSPO-token (without its clamp of the log-ratio at 10). Fidelity: reconstructed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp, masked_mean, where_mask
from tokenloom.methods.policy_optimization.importance import where_advantages
from tokenloom.methods.policy_optimization.ppo_clip import Limit, bounded, clip_multiplier

Interval = tuple[Limit, Limit]


def _average_multiplier(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    lo: Limit,
    hi: Limit,
    *,
    weight: float = 0.5,
    low: float = 3e-4,
    high: float = 4e-4,
    joint: bool = False,
) -> Tensor:
    mix = torch.full_like(advantages, weight)
    return _mixed_multiplier(log_ratio, advantages, mask, mix, (lo, hi), (1 - low, 1 + high), joint)


@part("dhpo", stage="surrogate", scope="row", paper="arXiv:2601.05607", multiplier=_average_multiplier)
def dhpo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    lo: Limit = 0.8,
    hi: Limit = 1.28,
    *,
    weight: float = 0.5,
    low: float = 3e-4,
    high: float = 4e-4,
    joint: bool = False,
) -> Tensor:
    """Objective [B, T] from token log-ratios, zero off the mask; `weight` is the share of the token branch.

    `lo`, `hi` are absolute limits of the token ratio; `low`, `high` distances of the sequence ratio from 1.

    Raises:
        ValueError: for a weight outside [0, 1] or negative distances.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is the share of the token branch, in [0, 1]; got {weight}")
    mix = torch.full_like(where_advantages(advantages, mask), weight)
    return _mixed(log_ratio, advantages, mask, mix, (lo, hi), _interval(low, high), joint)


def _entropy_multiplier(
    log_ratio: Tensor,
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    lo: Limit,
    hi: Limit,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    joint: bool = False,
) -> Tensor:
    mix = entropy_share(entropies, mask)
    return _mixed_multiplier(log_ratio, advantages, mask, mix, (lo, hi), (1 - low, 1 + high), joint)


@part("dhpo/entropy", stage="surrogate", scope="row", paper="arXiv:2601.05607", multiplier=_entropy_multiplier)
def entropy_guided(
    log_ratio: Tensor,
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    lo: Limit = 0.8,
    hi: Limit = 1.28,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    joint: bool = False,
) -> Tensor:
    """As `dhpo`, the token branch weighted by the token's entropy relative to the row's largest; it gets no gradient.

    Raises:
        ValueError: for negative distances.
    """
    mix = entropy_share(entropies, mask)
    return _mixed(log_ratio, advantages, mask, mix, (lo, hi), _interval(low, high), joint)


def entropy_share(entropies: Tensor, mask: Tensor) -> Tensor:
    """Entropy over the row's largest, in [0, 1], detached: [B, T]; 0 in a row without entropy.

    >>> entropy_share(torch.tensor([[0.5, 2.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([[0.2500, 1.0000]])
    """
    h = where_mask(entropies.detach(), mask)
    if h.shape[1] == 0:
        return h
    largest = h.amax(-1, keepdim=True)
    return h / torch.where(largest > 0, largest, torch.ones_like(largest))


def _interval(low: float, high: float) -> Interval:
    if low < 0 or high < 0:
        raise ValueError(f"clip distances must be >= 0, got low={low}, high={high}")
    return 1 - low, 1 + high


def _mixed(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, mix: Tensor, token: Interval, row: Interval, joint: bool
) -> Tensor:
    a, own = where_advantages(advantages, mask), where_mask(log_ratio, mask)
    r, s = clamped_exp(own, mask), clamped_exp(_row_mean(own, mask) + (own - own.detach()), mask)
    r_held, s_held = bounded(r, *token), bounded(s, *row)
    if joint:
        return torch.minimum((mix * r + (1 - mix) * s) * a, (mix * r_held + (1 - mix) * s_held) * a)
    return mix * torch.minimum(r * a, r_held * a) + (1 - mix) * torch.minimum(s * a, s_held * a)


def _mixed_multiplier(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, mix: Tensor, token: Interval, row: Interval, joint: bool
) -> Tensor:
    own = where_mask(log_ratio.detach(), mask)
    r, s = clamped_exp(own, mask), clamped_exp(_row_mean(own, mask).expand(own.shape), mask)
    if not joint:
        return mix * clip_multiplier(r, advantages, *token) + (1 - mix) * clip_multiplier(s, advantages, *row)
    free, r_held, s_held = mix * r + (1 - mix) * s, bounded(r, *token), bounded(s, *row)
    held = mix * where_mask(r, r_held == r) + (1 - mix) * where_mask(s, s_held == s)
    return torch.where(free * advantages <= (mix * r_held + (1 - mix) * s_held) * advantages, free, held)


def _row_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(log_ratio.detach(), mask, -1)[:, None]


@preset("dhpo", paper="arXiv:2601.05607")
def dhpo_preset(*, mixing: Literal["average", "entropy"] = "average", joint: bool = False) -> Algorithm:
    """GRPO's advantage, mixed ratios (tokens within 0.2 / 0.28, rows within 3e-4 / 4e-4), sequence mean, no KL."""
    return Algorithm.compose(
        advantage="grpo",
        surrogate={"part": "dhpo" if mixing == "average" else "dhpo/entropy", "joint": joint},
        bounds={"part": "clip", "low": 0.2, "high": 0.28},
        aggregate="sequence-mean",
    )
