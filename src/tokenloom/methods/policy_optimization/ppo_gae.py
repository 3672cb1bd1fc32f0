"""GAE: advantages from a critic, exponentially between one-step TD and Monte Carlo (arXiv 1506.02438; PPO 1707.06347).

delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V     [B, T]
The recursion runs over sampled tokens; at tool output the next value and advantage pass through unchanged.
A is then whitened over the sampled tokens of the batch (Bessel, eps 1e-8 under the root).
Value loss: max((v - ret)^2, (v_old + clip(v - v_old, +-clip) - ret)^2) / 2.
Deviations: advantages are zero off the mask, where verl leaves carried values. Unscorable rows (NaN) give 0 and
regress to their own value. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask, whiten


@part("ppo-gae", stage="advantage", scope="batch", paper="arXiv:1506.02438", gives=["returns"])
def ppo_gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whitened: bool = True,
) -> dict[str, Tensor]:
    """`advantages` and `returns`, both [B, T].

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.7]])
    >>> ppo_gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), lam=0.5, whitened=False)["advantages"]
    tensor([[0.4750, 0.3500, 0.3000]])
    """
    scored = scored_tokens(token_rewards, mask)
    advantages = gae(token_rewards, values, scored, gamma, values.new_full((len(values), 1), lam))
    returns = where_mask(advantages + where_mask(values, mask), mask)
    return {"advantages": whiten(advantages, scored) if whitened else advantages, "returns": returns}


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor) -> Tensor:
    """Generalized advantages [B, T] without gradient, zero off the mask; `lam` [B, 1] may differ by row."""
    rewards, v = where_mask(token_rewards.detach(), mask), where_mask(values.detach(), mask)
    next_value = next_advantage = torch.zeros_like(lam[:, 0])
    columns = []
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * lam[:, 0] * next_advantage
        next_value = torch.where(here, v[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        columns.append(next_advantage)
    return where_mask(torch.stack(columns[::-1], -1), mask) if columns else torch.zeros_like(v)


def scored_tokens(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """The mask without rows whose rewards hold a NaN: [B, T] bool."""
    return mask & ~where_mask(token_rewards, mask).isnan().any(-1, keepdim=True)


@part("ppo-gae/value-loss", stage="term", scope="token", paper="arXiv:1707.06347")
def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float | None = 0.5,
) -> Tensor:
    """Clipped squared error of the critic [B, T], a loss; `clip=None` (or no old values) is the plain square / 2."""
    v, target = where_mask(values, mask), where_mask(returns.detach(), mask)
    loss = (v - target) ** 2
    if clip is not None and old_values is not None:
        old = where_mask(old_values.detach(), mask)
        loss = torch.maximum(loss, (old + (v - old).clamp(-clip, clip) - target) ** 2)
    return loss / 2


@preset("ppo-gae", paper="arXiv:1707.06347")
def ppo_gae_preset(
    *,
    lam: float = 0.95,
    gamma: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
    value_coef: float = 0.5,
    epochs: int = 1,
    mini_batches: int = 1,
    kl_coef: float = 0.0,
) -> Algorithm:
    """PPO with a critic: GAE, clip 0.2, clipped value loss; k1 KL in the token rewards if asked."""
    return Algorithm.compose(
        reward=[{"part": "kl/in-reward", "coef": kl_coef}] if kl_coef else [],
        advantage={"part": "ppo-gae", "lam": lam, "gamma": gamma},
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": low, "high": high},
        aggregate="token-mean",
        updates={"part": "mini-batches", "epochs": epochs, "mini_batches": mini_batches},
        terms=[{"part": "ppo-gae/value-loss", "coef": value_coef}],
    )
