"""Difficulty probe: the value of the state before the first answer token, from hidden states (arXiv 2509.12886).

V(s) in [0, 1] estimates how good the finished answer will be (1 right, 0 wrong); s_0 has read the question only.
temporal difference   L = sum_t (V(s_t) - sg[V(s_t+1)])^2, the target of the last state is the reward r     (gamma = 1)
Monte Carlo           L = sum_t (V(s_t) - r)^2, with the same fixed point
difficulty = 1 - V(s_0);  samples to spend n = n_min + ceil((n_max - n_min) * difficulty)

States s_0..s_T of a row are those after the question and after each answer token: S = T + 1 of them. Deviations: losses
are means over rows, so that their scale does not grow with the batch; the probe's size is unpublished.
Fidelity: paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("difficulty-probe", stage="objective", scope="batch", paper="arXiv:2509.12886")
def td_loss(values: Tensor, rewards: Tensor, mask: Tensor, *, monte_carlo: bool = False) -> Tensor:
    """The loss from `values` [B, S] of states, final `rewards` [B] and `mask` [B, S], True on states, no holes.

    Raises:
        ValueError: when a row has no state.
    """
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("difficulty-probe needs at least one state in every row")
    final = rewards.to(values.dtype)[:, None].expand_as(values)
    if monte_carlo:
        targets = final
    else:
        behind = torch.cat((values[:, 1:], values[:, -1:]), 1).detach()
        last = torch.arange(values.shape[1], device=values.device) >= (lengths - 1)[:, None]
        targets = torch.where(last, final, behind)
    error = torch.where(mask, values - targets, 0.0)
    return error.square().sum(1).mean()


@part("difficulty-probe/samples", stage="probe", scope="row", paper="arXiv:2509.12886")
def samples_for(difficulty: Tensor, *, n_min: int = 1, n_max: int = 16) -> Tensor:
    """How many samples [B] a question of `difficulty` [B] in [0, 1] is worth.

    Raises:
        ValueError: unless 1 <= n_min <= n_max.
    """
    _check(n_min, n_max)
    # A difficulty of 3/5 over a span of 5 is 3 samples, not 4 by the last bit of the product.
    return n_min + ((n_max - n_min) * difficulty.double().clamp(0, 1) - 1e-6).ceil().clamp(min=0).long()


@part("difficulty-probe/two-levels", stage="probe", scope="row", paper="arXiv:2509.12886")
def two_levels(difficulty: Tensor, *, threshold: float = 0.5, n_min: int = 1, n_max: int = 16) -> Tensor:
    """`n_max` samples for questions above `threshold`, `n_min` for the others, [B]; refine only those above it.

    Raises:
        ValueError: unless 1 <= n_min <= n_max.
    """
    _check(n_min, n_max)
    return torch.where(difficulty > threshold, n_max, n_min)


@part("difficulty-probe/auroc", stage="analysis", scope="batch", paper="arXiv:2509.12886")
def auroc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive of `labels` [n] bool outranks a negative by `scores` [n], ties counting half.

    NaN when one kind is missing.
    """
    positive, negative = scores[labels.bool()].double(), scores[~labels.bool()].double()
    if positive.numel() == 0 or negative.numel() == 0:
        return math.nan
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return float((below + up_to).double().mean() / 2 / len(negative))


def _check(n_min: int, n_max: int) -> None:
    if not 1 <= n_min <= n_max:
        raise ValueError(f"difficulty-probe needs 1 <= n_min <= n_max, got {n_min} and {n_max}")
