"""TEMPO: the group's prefix tree is a value table, and branch tokens get a TD error (arXiv 2509.18314).

V(s_t) = mean reward of the group's rows that share row i's first t tokens; V(s_0) is the group's mean
A_{i,t} = GRPO's advantage + (V(s_{t+1}) - V(s_t)) / (std_g + eps), Bessel std                        [B, T]
Only tokens at which the tree branches differ from GRPO; std="none" (on a Dr.GRPO base) does not divide.
The sum of the TD errors of a row is R_i - mean_g (the mean over rows identical to i, minus mean_g).
Deviations: rows match up to their ends only (the released code compares padding ids), a group of one gives 0
(there NaN), rows without a reward (NaN) are left out of the tree, and tool output belongs to the transition.
No shared token makes the first token's advantage twice GRPO's and leaves the rest. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_std, where_mask
from tokenloom.methods.policy_optimization.prefix_tree import next_decision, prefix_nodes, prefix_values


@part("tempo", stage="credit", scope="group", paper="arXiv:2509.18314")
def tempo(
    advantages: Tensor,
    rewards: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    std: Literal["group", "none"] = "group",
    eps: float = 1e-6,
) -> Tensor:
    """Advantages [B, T] plus the normalized TD errors of the group's prefix tree; zero off the mask.

    >>> import torch
    >>> tokens, one = torch.tensor([[1, 2], [1, 3]]), torch.ones(2, 2, dtype=torch.bool)
    >>> rewards, lengths, group = torch.tensor([1.0, 0.0]), torch.tensor([2, 2]), torch.zeros(2, dtype=torch.int64)
    >>> base = torch.tensor([[0.5, 0.5], [-0.5, -0.5]])
    >>> tempo(base, rewards, tokens, lengths, group, one, std="none")
    tensor([[ 0.5000,  1.0000],
            [-0.5000, -1.0000]])
    """
    scored = ~rewards.isnan()
    td = tree_td(rewards, tokens, lengths, group_ids, mask)
    if std == "group":
        td = td / (group_std(rewards, group_ids, scored) + eps)[:, None]
    return where_mask(advantages + td, mask)


def tree_td(rewards: Tensor, tokens: Tensor, lengths: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """V(next state) - V(state) of each sampled token [B, T], zero off the mask and in rows without a reward."""
    scored = ~rewards.isnan()
    values = prefix_values(prefix_nodes(tokens, lengths, group_ids), rewards, scored)
    return where_mask(values.gather(1, next_decision(mask)) - values[:, :-1], mask & scored[:, None])


@preset("tempo", paper="arXiv:2509.18314")
def tempo_preset(*, std: Literal["group", "none"] = "group", low: float = 0.2, high: float = 0.28) -> Algorithm:
    """GRPO's advantage (with std="none": Dr.GRPO's) plus tree TD; token mean, clip 0.2 / 0.28, no KL."""
    return Algorithm.compose(
        advantage={"part": "grpo", "std": std},
        credit=[{"part": "tempo", "std": std}],
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": low, "high": high},
        aggregate="token-mean",
    )
