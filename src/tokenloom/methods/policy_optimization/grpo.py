"""GRPO: rewards normalized within the group of a prompt (arXiv 2402.03300, eq. 3).

A_i = (R_i - mean_g R) / (std_g R + eps), broadcast over sampled tokens                 [B, T]
PPO clip, mean over tokens then rows, beta * k3 to the reference in the loss.
Frameworks disagree on everything but the numerator; see `dialect` (OpenRLHF's other estimator,
`reinforce_baseline`, is `reinforce-pp` with baseline and dialect "openrlhf"). A constant group gives exactly 0;
unscorable rows (NaN) are left out of the statistics and get 0; a single row gives 0 (verl: R / (1 + eps)).
`leave-one-out` is NeMo-RL's default: mean and std of the *other* rows, divided only where that std > 0.

Deviations: Bessel's correction as in the released code, where the paper does not say. Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_constant, group_mean, group_size, group_std, to_tokens


@part("grpo", stage="advantage", scope="group", paper="arXiv:2402.03300")
def grpo(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    eps: float = 1e-6,
    std: Literal["group", "batch", "none"] = "group",
    single: Literal["zero", "reward"] = "zero",
    correction: int = 1,
) -> Tensor:
    """Advantages [B, T]. `std` says over which rows the divisor is taken.

    >>> group, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    >>> grpo(torch.tensor([1.0, 0.0, 0.0, 1.0]), group, one).squeeze(-1)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660])
    """
    scored = ~rewards.isnan()
    centered = center(rewards, group_ids)
    divisor = torch.ones_like(centered)
    if std != "none":
        over = group_ids if std == "group" else torch.zeros_like(group_ids)
        divisor = group_std(rewards, over, scored, correction=correction) + eps
    advantages = centered / divisor
    if single == "reward":
        # verl takes mean 0 and, when it divides at all, std 1 for a group of one.
        alone = group_size(group_ids, scored) == 1
        advantages = torch.where(alone, rewards / (1 if std == "none" else 1 + eps), advantages)
    return to_tokens(torch.where(scored, advantages, torch.zeros_like(advantages)), mask)


@part("grpo/leave-one-out", stage="advantage", scope="group", paper="arXiv:2402.03300")
def leave_one_out(rewards: Tensor, group_ids: Tensor, mask: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Advantages [B, T] against mean and Bessel std of the other rows, as NeMo-RL normalizes by default.

    >>> group, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.0, 0.0]), group, one).squeeze(-1)
    tensor([ 1.0000, -0.5773, -0.5773, -0.5773])
    """
    advantages = torch.zeros_like(rewards)
    for group in torch.unique(group_ids):
        rows = ((group_ids == group) & ~rewards.isnan()).nonzero().reshape(-1)
        if len(rows) < 2:
            continue
        size = len(rows)
        others = rewards[rows].expand(size, size)[~torch.eye(size, dtype=torch.bool, device=rows.device)]
        others = others.reshape(size, size - 1)
        mean = others.mean(-1)
        std = others.std(-1) if size > 2 else torch.zeros_like(mean)
        std = torch.where((others == others[:, :1]).all(-1), torch.zeros_like(std), std)
        centered = rewards[rows] - mean
        advantages[rows] = torch.where(std > 0, centered / (std + eps), centered)
    settled = group_constant(rewards, group_ids, ~rewards.isnan())
    return to_tokens(torch.where(settled, torch.zeros_like(advantages), advantages), mask)


def center(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Rewards minus the mean of the group's scorable rows: [B], exactly 0 in constant groups, NaN kept as 0."""
    scored = ~rewards.isnan()
    centered = rewards - group_mean(rewards, group_ids, scored)
    settled = group_constant(rewards, group_ids, scored) | ~scored
    return torch.where(settled, torch.zeros_like(centered), centered)


_DIALECTS: dict[str, dict[str, Any]] = {
    "paper": {"kl": 0.04},
    "verl": {
        "aggregate": "token-mean",
        "surrogate": "dual-clip",
        "bounds": {"cap": 3.0},
        "advantage": {"single": "reward"},
        "term": {"value_limit": 10.0},
    },
    "trl": {"aggregate": "token-mean", "advantage": {"eps": 1e-4}, "term": {"times_ratio": True}},
    "openrlhf": {"aggregate": "token-mean", "advantage": {"eps": 1e-9}},
    "nemo-rl": {"aggregate": "token-mean", "advantage": "grpo/leave-one-out"},
    "prime-rl": {"aggregate": "token-mean", "advantage": {"std": "none"}},
}


@preset("grpo", paper="arXiv:2402.03300")
def grpo_preset(
    *,
    dialect: Literal["paper", "verl", "trl", "openrlhf", "nemo-rl", "prime-rl"] = "paper",
    kl_coef: float | None = None,
) -> Algorithm:
    """GRPO as the paper or a framework runs it. `kl_coef=None` takes the dialect's (0.04 in the paper, else 0)."""
    said = _DIALECTS[dialect]
    algorithm = Algorithm.compose(advantage="grpo", surrogate="ppo-clip", bounds="clip", aggregate="sequence-mean")
    algorithm = algorithm.override(**{k: v for k, v in said.items() if k not in ("kl", "term")})
    beta = said.get("kl", 0.0) if kl_coef is None else kl_coef
    if not beta:
        return algorithm
    return algorithm.with_term("kl", coef=beta, estimator="k3", **said.get("term", {}))
