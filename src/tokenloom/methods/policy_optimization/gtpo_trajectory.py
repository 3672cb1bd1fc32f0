"""GTPO (trajectory-based): spare the tokens that right and wrong responses share, drop confused responses
(arXiv 2508.03772).

A token is in conflict when a row with A > 0 and a row with A < 0 of its group hold it at the same position,
counted from the start (forward run, from position 0 to the first token without conflict) or from the rows'
ends (backward run). lambda starts at 1 and each run that holds the token multiplies it by `factor` where
A_i > 0 and by 0 where A_i < 0: formats and shared openings are not punished, and rewarded the more.
A'_{i,t} = lambda_{i,t} (A_i - penalty <H>_i), <H>_i the row's mean entropy in nats                       [B, T]
`entropy-filter`: weight 0 on rows with <H>_i > threshold, provided that the initial policy's mean entropy is
below it. The row still counts in the mean over rows. Surrogate A' * logprob (its gradient is that of
exp(logp - sg(logp)) A'), no KL, no ratio. Signs are those before the penalty; rows with A = 0 neither make nor
suffer conflicts; positions without a sampled token end a run. With penalty 0, a constant group gives 0.

dialect="code": every row above 0.7 nats is dropped, whatever the initial entropy was. divide_by_conflicts
divides a row by the number of its tokens in conflict, as the code does and the printed objective does not (the code
counts with an indexing slip and sums rows; here tokens in either run count once). Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_index, masked_mean, where_mask

_PAPER = "arXiv:2508.03772"


@part("gtpo-trajectory", stage="credit", scope="group", paper=_PAPER)
def gtpo_trajectory(
    advantages: Tensor,
    rewards: Tensor,
    entropies: Tensor,
    tokens: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    factor: float = 2.0,
    penalty: float = 0.1,
    divide_by_conflicts: bool = False,
) -> Tensor:
    """Advantages [B, T], penalized by the row's entropy and multiplied by lambda; a row's sign is its mean's.

    Rows without a reward (NaN) are not penalized, so that nothing moves them.
    """
    row = masked_mean(advantages, mask, -1)
    forward, backward = conflict_runs(tokens, row, group_ids, mask)
    once = torch.where(row > 0, factor, torch.where(row < 0, 0.0, 1.0)).to(row.dtype)[:, None]
    one = torch.ones_like(advantages)
    weight = torch.where(forward, once, one) * torch.where(backward, once, one)
    if divide_by_conflicts:
        weight = weight / (forward | backward).sum(-1, keepdim=True).clamp(min=1)
    cost = where_mask(penalty * mean_entropy(entropies, mask), ~rewards.isnan())
    return where_mask(weight * (advantages - cost[:, None]), mask)


def conflict_runs(tokens: Tensor, signs: Tensor, group_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward runs of tokens in conflict, bool [B, T] each; `signs` [B] is the rows' advantage.

    Rows with sign 0 are in neither.
    """
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(mask, place, -1).amax(-1, keepdim=True) if mask.shape[1] else place[:, :1]
    active = mask & signs.ne(0)[:, None]
    forward = _contested(place, tokens, signs, group_ids, active).int().cumprod(-1).bool()
    backward = _contested(last - place, tokens, signs, group_ids, active) | (place > last)
    backward = backward.flip(-1).int().cumprod(-1).bool().flip(-1) & active
    return forward, backward


@part("gtpo-trajectory/entropy-filter", stage="weight", scope="batch", paper=_PAPER)
def entropy_filter(
    entropies: Tensor,
    mask: Tensor,
    state: dict[str, float] | None,
    *,
    threshold: float = math.log(2),
    initial: float | None = None,
) -> tuple[Tensor, dict[str, float] | None]:
    """Weights [B, T] of 0 and 1, constant along rows, and as state the mean entropy of the first batch's rows.

    `initial` states the initial policy's mean entropy in nats instead of measuring it on the first batch.
    """
    row, live = mean_entropy(entropies, mask), mask.any(-1)
    if initial is None:
        if state is None and bool(live.any()):
            state = {"initial": float(row[live].mean())}
        initial = math.inf if state is None else state["initial"]
    keep = row <= threshold if initial < threshold else torch.ones_like(live)
    return (mask & keep[:, None]).to(entropies.dtype), state


def mean_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the row's sampled tokens in nats, [B], without gradient."""
    return masked_mean(entropies.detach(), mask, -1)


def _contested(place: Tensor, tokens: Tensor, signs: Tensor, group_ids: Tensor, active: Tensor) -> Tensor:
    """bool [B, T]: an active row with a positive and one with a negative sign hold this token at this place."""
    kept = place[active]
    group = group_index(group_ids)[0][:, None].expand(active.shape)[active]
    token, kinds = group_index(tokens[active])
    sign = signs[:, None].expand(active.shape)[active]
    width = int(kept.max()) + 1 if len(kept) else 1
    key, number = group_index((group * width + kept) * max(kinds, 1) + token)
    counts = [torch.zeros(number, dtype=key.dtype, device=key.device) for _ in range(2)]
    held = [c.index_add_(0, key, (sign * s > 0).to(key.dtype)) > 0 for c, s in zip(counts, (1, -1), strict=True)]
    return torch.zeros_like(active).masked_scatter(active, (held[0] & held[1])[key])


@preset("gtpo-trajectory", paper=_PAPER)
def gtpo_trajectory_preset(
    *,
    dialect: Literal["paper", "code"] = "paper",
    factor: float = 2.0,
    penalty: float = 0.1,
    std: bool = False,
    divide_by_conflicts: bool = False,
) -> Algorithm:
    """Reward minus the group's mean (std=True: GRPO's advantage), conflicts, entropy penalty and filter, no ratio."""
    limit = {"threshold": 0.7, "initial": 0.0} if dialect == "code" else {}
    return Algorithm.compose(
        advantage="grpo" if std else "dr-grpo/center",
        credit=[
            {
                "part": "gtpo-trajectory",
                "factor": factor,
                "penalty": penalty,
                "divide_by_conflicts": divide_by_conflicts,
            }
        ],
        weight=[{"part": "gtpo-trajectory/entropy-filter"} | limit],
        surrogate="reinforce/score",
        aggregate="sequence-mean",
    )
