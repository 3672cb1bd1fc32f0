"""REINFORCE++: token returns whitened over the whole batch (arXiv 2501.03262).

G_t = r_t + gamma * G_{t+1} over sampled tokens; A = (G - mean G) / sqrt(var G + 1e-8)   [B, T]
Mean and variance run over all sampled tokens of the batch, variance with Bessel's correction
(correction=0 for OpenRLHF's population variance). The baseline variant first subtracts the group's
mean reward. masked="carry" passes the running return through tool output (verl today);
masked="reset" cuts credit there (older verl). Unscorable rows (NaN) get advantage 0 and are left out.
Deviations: a batch with fewer than two sampled tokens gives zeros where verl raises. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import to_tokens, where_mask, whiten
from tokenloom.methods.policy_optimization.grpo import center


@part("reinforce-pp", stage="advantage", scope="batch", paper="arXiv:2501.03262")
def reinforce_pp(
    token_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    masked: Literal["carry", "reset"] = "carry",
    correction: int = 1,
) -> Tensor:
    """Whitened returns [B, T]: mean 0, variance 1 over the mask whenever rewards vary."""
    scored = mask & ~where_mask(token_rewards, mask).isnan().any(-1, keepdim=True)
    returns = discounted_returns(where_mask(token_rewards, scored), scored, gamma=gamma, masked=masked)
    return whiten(returns, scored, correction=correction)


@part("reinforce-pp/baseline", stage="advantage", scope="batch", paper="arXiv:2501.03262")
def reinforce_pp_baseline(rewards: Tensor, group_ids: Tensor, mask: Tensor, *, correction: int = 1) -> Tensor:
    """Rewards centered per group, then whitened over all sampled tokens of the batch: [B, T]."""
    usable = mask & ~rewards.isnan()[:, None]
    return whiten(to_tokens(center(rewards, group_ids), usable), usable, correction=correction)


def discounted_returns(
    token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, masked: Literal["carry", "reset"] = "carry"
) -> Tensor:
    """Right-to-left discounted sums [B, T] over sampled tokens, zero off the mask."""
    rewards = where_mask(token_rewards, mask)
    running = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.new_zeros(len(rewards))
    columns = []
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * running
        skipped = running if masked == "carry" else torch.zeros_like(running)
        running = torch.where(mask[:, t], here, skipped)
        columns.append(running)
    return where_mask(torch.stack(columns[::-1], -1), mask) if columns else rewards


@preset("reinforce-pp", paper="arXiv:2501.03262")
def reinforce_pp_preset(
    *, baseline: bool = False, dialect: Literal["verl", "openrlhf"] = "verl", kl_coef: float = 0.0
) -> Algorithm:
    """REINFORCE++ (plain or with the group baseline), PPO clip 0.2, k1 KL in the token rewards if asked.

    Dialect "openrlhf" whitens with the population variance; with `baseline` it is OpenRLHF's `reinforce_baseline`.
    """
    advantage = "reinforce-pp/baseline" if baseline else "reinforce-pp"
    return Algorithm.compose(
        reward=[{"part": "kl/in-reward", "coef": kl_coef}] if kl_coef else [],
        advantage={"part": advantage, "correction": 0 if dialect == "openrlhf" else 1},
        surrogate="ppo-clip",
        aggregate="token-mean",
    )
