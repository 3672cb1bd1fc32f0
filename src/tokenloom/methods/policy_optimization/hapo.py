"""HAPO: temperature, advantage and clip adapted to how uncertain each token was (arXiv 2509.16591).

Normalized entropy, over the batch's sampled tokens: l = ln max(H, 1e-8), q its rho-quantile (nearest rank),
h = l - q; positive h divided by the largest, negative h by the size of the smallest               [B, T] in [-1, 1]
1 sampling    logits / (1 + tau h), h of the current logits with q and divisors of the step before, clamped to [-1, 1]
2 advantage   A = (R - mu) / (sigma + eps), mean and population std over the group's *tokens*, so that long responses
              count more; a group in which any |A| reaches 5 takes GRPO's advantage instead
3 credit      A (1 + beta h) outside the neutral zone ((1 + lo) / 2, (1 + hi) / 2) of the ratio where h > 0,
              and inside it where h <= 0; A elsewhere
4 bounds      lo = 1 - low (1 - alpha h) where h <= 0, hi = 1 + high (1 + alpha h) where h > 0
On DAPO with dual clip. Deviations: negative h keep their sign (the released code divides them by a negative number);
only sampled tokens are looked at when |A| is compared with 5 (the released code looks at padding, too); entropies
are those at the start of the update, so that the whole batch shares one quantile under any split.
Limit: tau = alpha = beta = 0 is DAPO with the token-level average. Fidelity: code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_constant, group_mean, group_sum, to_tokens, where_mask
from tokenloom.methods.policy_optimization.grpo import grpo
from tokenloom.methods.policy_optimization.ppo_clip import Limit

PAPER = "arXiv:2509.16591"

Scale = dict[str, float]
"""The quantile of log-entropy and the divisors above and below it."""


def entropy_scale(entropies: Tensor, mask: Tensor, rho: float) -> Scale | None:
    """What normalizes log-entropies over the sampled tokens, None when there are none."""
    logs = _log(entropies[mask]).sort().values
    if not len(logs):
        return None
    # Python rounds half to even, as the released code does.
    pivot = float(logs[round(rho * (len(logs) - 1))])
    return {"pivot": pivot, "above": float(logs[-1]) - pivot, "below": pivot - float(logs[0])}


def normalized(entropies: Tensor, scale: Scale) -> Tensor:
    """Normalized entropy in [-1, 1] of any shape; 0 on a side without spread."""
    h = _log(entropies) - scale["pivot"]
    above = h / scale["above"] if scale["above"] > 0 else torch.zeros_like(h)
    below = h / scale["below"] if scale["below"] > 0 else torch.zeros_like(h)
    return torch.where(h > 0, above, below).clamp(-1, 1)


def _log(entropies: Tensor) -> Tensor:
    return entropies.clamp(min=1e-8).log()


@part("hapo/temperature", stage="sampling", scope="token", paper=PAPER)
def adaptive_temperature(logits: Tensor, state: Scale | None, *, tau: float = 0.05) -> Tensor:
    """Logits [N, V], hotter where they are uncertain; unchanged until a step has set the scale."""
    if state is None:
        return logits
    law = torch.log_softmax(logits, -1)
    entropies = -(law.exp() * law.clamp(min=torch.finfo(law.dtype).min)).sum(-1)
    return logits / (1 + tau * normalized(entropies, state)[:, None])


@part("hapo", stage="advantage", scope="batch", paper=PAPER, gives={"normalized_entropies"})
def token_average(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, entropies: Tensor, state: Scale | None,
    *, rho: float = 0.8, eps: float = 1e-6, limit: float = 5.0,
) -> tuple[dict[str, Tensor], Scale | None]:  # fmt: skip
    """Advantages and normalized entropies [B, T]; the state is the scale for the next step's sampling.

    Raises:
        ValueError: for rho outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is the quantile of the entropies that counts as neutral, in [0, 1]; got {rho}")
    scored = ~rewards.isnan()
    value, length = rewards.nan_to_num(), mask.sum(-1) * scored
    tokens = group_sum(length.to(value.dtype), group_ids).clamp(min=1)
    centered = value - group_sum(length * value, group_ids) / tokens
    spread = (group_sum(length * centered**2, group_ids) / tokens).sqrt()
    advantages = torch.where(group_constant(rewards, group_ids, scored) | ~scored, 0.0, centered / (spread + eps))
    extreme = ((advantages.abs() >= limit) & (length > 0)).to(value.dtype)
    bessel = grpo(rewards, group_ids, torch.ones_like(mask[:, :1]))[:, 0] if mask.shape[1] else advantages
    advantages = torch.where(group_mean(extreme, group_ids) > 0, bessel, advantages)
    entropies = entropies.detach()
    scale = entropy_scale(entropies, mask, rho)
    h = torch.zeros_like(entropies) if scale is None else normalized(entropies, scale)
    found = {"advantages": to_tokens(advantages, mask), "normalized_entropies": where_mask(h, mask)}
    return found, scale or state


@part("hapo/redistribute", stage="credit", scope="token", paper=PAPER)
def redistribute(
    advantages: Tensor, normalized_entropies: Tensor, ratio: Tensor, mask: Tensor,
    lo: Limit = 0.8, hi: Limit = 1.2, *, beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Advantages [B, T], changed by their entropy far from the old policy, or near it for certain tokens."""
    ratio, h = ratio.detach(), where_mask(normalized_entropies, mask)
    neutral = (ratio > (1 + lo) / 2) & (ratio < (1 + hi) / 2)
    changed = torch.where(h > 0, ~neutral, neutral)
    return where_mask(torch.where(changed, advantages * (1 + beta * h), advantages), mask)


@part("hapo/bounds", stage="bounds", scope="token", paper=PAPER)
def adaptive_bounds(
    normalized_entropies: Tensor, *, low: float = 0.2, high: float = 0.2, cap: float = 10.0, alpha: float = 1.0
) -> tuple[Tensor, Tensor, float]:
    """Limits of the ratio [B, T]: wider below for certain tokens, wider above for uncertain ones.

    Raises:
        ValueError: for negative widths, or a lower limit below zero.
    """
    if low < 0 or high < 0 or low * (1 + abs(alpha)) > 1:
        raise ValueError(f"low, high must be >= 0 and low * (1 + alpha) <= 1, got {low}, {high} and alpha {alpha}")
    h = normalized_entropies.detach()
    lower = 1 - low * (1 - alpha * h.clamp(max=0))
    return lower, 1 + high * (1 + alpha * h.clamp(min=0)), cap


@preset("hapo", paper=PAPER)
def hapo_preset(*, rho: float = 0.8, tau: float = 0.05, alpha: float = 1.0, beta: float = 1.0) -> Algorithm:
    """All four parts on DAPO (dynamic sampling, overlong penalty, token mean), symmetric base bounds of 0.2."""
    base: dict[str, Any] = {"preset": "dapo", "dialect": "verl"}
    return Algorithm.from_recipe(base).override(
        sampling=[{"part": "hapo/temperature", "tau": tau}],
        advantage={"part": "hapo", "rho": rho},
        credit=[{"part": "hapo/redistribute", "beta": beta}],
        bounds={"part": "hapo/bounds", "alpha": alpha},
    )
