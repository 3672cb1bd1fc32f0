"""CANON: a group is cut in two by a metric, and each half is compared with the other and with itself
(arXiv 2509.23962).

Rows of a prompt are sorted by the metric (mean entropy, or length): the first floor(G/2) are the low half.
A_i = mu (R_i - mean R of the other half) + (1 - mu) (R_i - mean R of its own half)     [B, T], no std
alpha favors a side: on that half's rows R_i becomes alpha R_i, on the other rows the opposite mean is multiplied,
both in the mu-part only. The released estimators put alpha on the low half for entropy (below 1: favor high entropy)
and on the high half for length (below 1: favor short).
mu may also follow the batch ("annealed": mu = mean reward) or a cosine with warm-up and restarts. `canon/random`
halves at random, the paper's control. Constant-length aggregation as in Dr.GRPO.

Deviations: the released additive constant beta (0 by default) is left out; a prompt with a single scored row gets 0
(released: its scaled reward); mu is clamped to [0, 1]. Ties keep the order of the rows, so a constant metric still
splits unless tie="none", which gives such groups Dr.GRPO's advantage. Unscorable rows are left out. Limit: mu = 1/2,
alpha = 1 and even groups are Dr.GRPO. Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_constant, group_index, group_size, masked_mean, to_tokens, where_mask
from tokenloom.methods.policy_optimization.grpo import center

Side = Literal["high", "low"]
Tie = Literal["order", "none"]


@part("canon", stage="advantage", scope="group", paper="arXiv:2509.23962")
def canon(
    rewards: Tensor,
    group_ids: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    mu: float = 1.0,
    alpha: float = 1.0,
    alpha_on: Side = "low",
    tie: Tie = "order",
) -> Tensor:
    """Advantages [B, T], halves by the row's mean entropy. mu = 1 compares the halves, mu = 0 within them.

    Raises:
        ValueError: for mu outside [0, 1] or a negative alpha.
    """
    metric = masked_mean(entropies, mask, -1)
    return to_tokens(conditional(rewards, group_ids, metric, mu, alpha, alpha_on, tie), mask)


@part("canon/length", stage="advantage", scope="group", paper="arXiv:2509.23962")
def by_length(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    mu: float = 1.0,
    alpha: float = 1.0,
    alpha_on: Side = "high",
    tie: Tie = "order",
) -> Tensor:
    """Advantages [B, T], halves by the number of sampled tokens.

    Raises:
        ValueError: for mu outside [0, 1] or a negative alpha.

    >>> lengths, group = torch.tensor([1, 4, 2, 3]), torch.zeros(4, dtype=torch.int64)
    >>> mask = torch.arange(4)[None] < lengths[:, None]
    >>> by_length(torch.tensor([1.0, 1.0, 0.0, 1.0]), group, mask)[:, 0]
    tensor([ 0.0000,  0.5000, -1.0000,  0.5000])
    """
    metric = mask.sum(-1).to(rewards.dtype)
    return to_tokens(conditional(rewards, group_ids, metric, mu, alpha, alpha_on, tie), mask)


@part("canon/random", stage="advantage", scope="batch", paper="arXiv:2509.23962", properties={"draws"})
def at_random(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, generator: torch.Generator, *, mu: float = 1.0
) -> Tensor:
    """Advantages [B, T], halves drawn at random."""
    metric = torch.rand(rewards.shape, generator=generator, dtype=rewards.dtype, device=rewards.device)
    return to_tokens(conditional(rewards, group_ids, metric, mu), mask)


@part("canon/annealed", stage="advantage", scope="batch", paper="arXiv:2509.23962")
def annealed(rewards: Tensor, group_ids: Tensor, entropies: Tensor, mask: Tensor, *, tie: Tie = "order") -> Tensor:
    """Advantages [B, T], halves by mean entropy, mu = mean reward of the batch: within the halves while the model is
    weak, between them once it is strong.
    """
    mu = float(masked_mean(rewards, ~rewards.isnan()).clamp(0, 1))
    return to_tokens(conditional(rewards, group_ids, masked_mean(entropies, mask, -1), mu, tie=tie), mask)


@part("canon/cosine", stage="advantage", scope="group", paper="arXiv:2509.23962")
def cosine(
    rewards: Tensor,
    group_ids: Tensor,
    entropies: Tensor,
    mask: Tensor,
    step: int,
    *,
    first: Literal["inter", "intra"] = "inter",
    warmup: int = 30,
    total: int = 150,
    cycles: int = 3,
    tie: Tie = "order",
) -> Tensor:
    """Advantages [B, T], halves by mean entropy, mu by `restarted_cosine`: between the halves first, or within them.

    Raises:
        ValueError: when a cycle would be shorter than one step.
    """
    inter = first == "inter"
    most, least = (0.6, 0.0) if inter else (1.0, 0.4)
    curve = restarted_cosine(step, most, least, warmup=warmup, total=total, cycles=cycles)
    mu = 1 - curve if inter else curve
    return to_tokens(conditional(rewards, group_ids, masked_mean(entropies, mask, -1), mu, tie=tie), mask)


def conditional(
    rewards: Tensor,
    group_ids: Tensor,
    metric: Tensor,
    mu: float,
    alpha: float = 1.0,
    alpha_on: Side = "low",
    tie: Tie = "order",
) -> Tensor:
    """Advantages of rows [B] for halves by `metric` [B]; NaN rewards and single rows give 0."""
    if not 0 <= mu <= 1 or alpha < 0:
        raise ValueError(f"canon needs mu in [0, 1] and alpha >= 0, got mu={mu}, alpha={alpha}")
    scored = ~rewards.isnan()
    dense, groups = group_index(group_ids)
    high = upper_half(metric, group_ids, scored)
    halves = 2 * dense + high.long()
    sums = rewards.new_zeros(2 * groups).index_add_(0, halves, where_mask(rewards, scored))
    counts = rewards.new_zeros(2 * groups).index_add_(0, halves, scored.to(rewards.dtype))
    opposite = (sums / counts.clamp(min=1))[halves ^ 1]
    favored = high == (alpha_on == "high")
    one, more = torch.ones_like(rewards), torch.full_like(rewards, alpha)
    inter = torch.where(favored, more, one) * rewards - torch.where(favored, one, more) * opposite
    value = mu * inter + (1 - mu) * center(rewards, halves)
    if tie == "none":
        value = torch.where(group_constant(metric, group_ids, scored), center(rewards, group_ids), value)
    if alpha == 1:
        # Equal rewards leave nothing to compare, and rounding in the means must not look like a difference.
        value = where_mask(value, ~group_constant(rewards, group_ids, scored))
    return where_mask(value, scored & (group_size(group_ids, scored) > 1))


def upper_half(metric: Tensor, group_ids: Tensor, where: Tensor) -> Tensor:
    """bool [B]: the row's metric ranks among the last ceil(n/2) of its group's n counted rows; ties by row order."""
    dense, groups = group_index(group_ids)
    by_metric = where_mask(metric, where, float("inf")).argsort(stable=True)
    order = by_metric[dense[by_metric].argsort(stable=True)]
    starts = torch.bincount(dense, minlength=groups).cumsum(0).roll(1, 0)
    starts[:1] = 0
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - starts[dense[order]]
    return ranks >= group_size(group_ids, where) // 2


def restarted_cosine(
    step: int, most: float, least: float, *, warmup: int = 30, total: int = 150, cycles: int = 3
) -> float:
    """Rises linearly to `most` in `warmup` steps, then falls to `least` along a cosine, again in every cycle.

    >>> [round(restarted_cosine(s, 0.6, 0.0), 3) for s in (0, 29, 30, 50, 69, 70)]
    [0.02, 0.6, 0.6, 0.3, 0.001, 0.6]
    """
    if step < warmup:
        return most * (step + 1) / warmup
    length = (total - warmup) // cycles
    if length < 1:
        raise ValueError(f"{cycles} cycles do not fit between steps {warmup} and {total}; make total larger")
    phase = (step - warmup) % length / length
    return least + (most - least) * (1 + math.cos(math.pi * phase)) / 2


@preset("canon", paper="arXiv:2509.23962")
def canon_preset(
    *,
    metric: Literal["entropy", "length", "random"] = "entropy",
    mu: float = 1.0,
    alpha: float = 1.0,
    schedule: Literal["constant", "annealed", "inter-first", "intra-first"] = "constant",
) -> Algorithm:
    """Halves by entropy, length or chance, constant-length aggregation, clip 0.2 / 0.28, no KL.

    Raises:
        ValueError: for a schedule with another metric than entropy or with mu or alpha of its own.
    """
    advantage: dict[str, Any] = {"part": "canon" if metric == "entropy" else f"canon/{metric}", "mu": mu}
    if metric != "random":
        advantage["alpha"] = alpha
    if schedule != "constant":
        if (metric, mu, alpha) != ("entropy", 1.0, 1.0):
            raise ValueError(f"schedule {schedule!r} sets mu itself and splits by entropy with alpha = 1")
        advantage = {"part": "canon/cosine", "first": schedule.removesuffix("-first")}
        if schedule == "annealed":
            advantage = {"part": "canon/annealed"}
    return Algorithm.compose(
        advantage=advantage,
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": 0.2, "high": 0.28},
        aggregate="dr-grpo/constant-length",
    )
