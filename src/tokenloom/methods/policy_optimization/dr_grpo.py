"""Dr.GRPO: no std, and a constant length in the denominator (arXiv 2503.20783).

A_i = R_i - mean_g R; scale = mask / (rows * L)                                       [B, T]
Removes GRPO's two biases: towards easy and hard prompts (the std) and towards short right and long
wrong answers (the length). L is the longest response that could be sampled (`max_tokens`), so padding
changes nothing. divisor="rows": TRL and verl today divide by rows and L; "length": older verl, L only;
"one": a plain sum over tokens, averaged over rows. rows="live" leaves fully masked rows out of the count
(verl), "all" counts them (TRL). Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import to_tokens
from tokenloom.methods.policy_optimization.grpo import center
from tokenloom.methods.policy_optimization.token_mean import counted_tokens


@part("dr-grpo/center", stage="advantage", scope="group", paper="arXiv:2503.20783")
def group_centered(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B, T]: reward minus the group's mean, (G - 1) / G of RLOO's.

    >>> import torch
    >>> group, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    >>> group_centered(torch.tensor([1.0, 0.0, 0.0, 0.0]), group, one).squeeze(-1)
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    return to_tokens(center(rewards, group_ids), mask)


@part("dr-grpo/constant-length", stage="aggregate", scope="batch", paper="arXiv:2503.20783")
def constant_length(
    mask: Tensor,
    max_tokens: int | None = None,
    weights: Tensor | None = None,
    *,
    length: int | None = None,
    divisor: Literal["rows", "length", "one"] = "rows",
    rows: Literal["live", "all"] = "live",
) -> Tensor:
    """Scale [B, T], the same for every token. `length=None` takes `max_tokens`, or the padded width without it.

    `weights` lend their dtype.

    >>> import torch
    >>> constant_length(torch.tensor([[True, True], [True, False]]), 8)
    tensor([[0.0625, 0.0625],
            [0.0625, 0.0000]])
    """
    constant = length or max_tokens or mask.shape[1] or 1
    number = int(mask.any(-1).sum()) if rows == "live" else mask.shape[0]
    denominator = {"rows": constant * max(number, 1), "length": constant, "one": max(number, 1)}[divisor]
    return counted_tokens(mask, weights, "mask") / float(denominator)


@preset("dr-grpo", paper="arXiv:2503.20783")
def dr_grpo_preset(
    *, dialect: Literal["paper", "trl", "verl", "verl-old"] = "paper", length: int | None = None
) -> Algorithm:
    """Dr.GRPO with PPO's clip and no KL. `length` is L (verl's loss_scale_factor), by default the longest
    response that can be sampled, which is the width that verl pads to.
    """
    special = {"trl": {"rows": "all"}, "verl-old": {"divisor": "length"}}.get(dialect, {})
    aggregate = {"part": "dr-grpo/constant-length", "length": length} | special
    surrogate = "dual-clip" if dialect.startswith("verl") else "ppo-clip"
    algorithm = Algorithm.compose(advantage="dr-grpo/center", surrogate=surrogate, aggregate=aggregate)
    return algorithm.override(bounds={"cap": 3.0}) if dialect.startswith("verl") else algorithm
