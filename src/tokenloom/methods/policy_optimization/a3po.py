"""A3PO: right answers lean on their unlikely tokens, wrong ones on their likely tokens, early on (arXiv 2512.21625).

A' = A * scale on the selected tokens                                                   [B, T]
Selected are, in each right row, the max(1, floor(n q)) least probable of its n sampled tokens, and in each wrong row
as many of the most probable (under the policy at the start of the update); two more rules, "positive high" and
"negative low", serve the paper's study, and `a3po/entropy` ranks by entropy. Rules that overlap multiply; ties go to
the earlier token. The scale starts at 2 and falls to 1, where nothing is shaped.
`a3po/polarity` is the study's advantage of single samples, x R for right rows and y (R - 1) for wrong ones: PSR is
y = 0, NSR is x = 0. `a3po/weighted` scales any advantages by side.

Deviations: a row is right when its verifier reward exceeds `threshold` (released: equal to 1, wrong: equal to 0,
the same for binary rewards); tokens of entropy or probability exactly 0 count (released: skipped). The paper lets the
scale decay, the released code holds it; 2 and a linear fall over 100 steps are ours. Limit: scale 1 is the identity.
Fidelity: code for the shaping, reconstructed for the decay.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import to_tokens, where_mask
from tokenloom.schedule import Schedule


@part("a3po", stage="credit", scope="row", paper="arXiv:2512.21625")
def a3po(
    advantages: Tensor,
    outcomes: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    ratio: float = 0.2,
    positive_low: float = 2.0,
    negative_high: float = 2.0,
    positive_high: float = 1.0,
    negative_low: float = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """Advantages [B, T], scaled on the extremes of probability. `ratio` is the share of a row's tokens per rule; for
    different shares list the part once per rule.

    Raises:
        ValueError: for a ratio outside (0, 1] or a negative scale.
    """
    scales = (positive_low, negative_high, positive_high, negative_low)
    return shaped(advantages, outcomes, old_logprobs, mask, ratio, scales, threshold)


@part("a3po/entropy", stage="credit", scope="row", paper="arXiv:2512.21625")
def by_entropy(
    advantages: Tensor,
    outcomes: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    ratio: float = 0.2,
    positive_low: float = 1.0,
    negative_high: float = 1.0,
    positive_high: float = 2.0,
    negative_low: float = 2.0,
    threshold: float = 0.5,
) -> Tensor:
    """Advantages [B, T], scaled on the extremes of entropy; unlikely tokens are those of high entropy.

    Raises:
        ValueError: for a ratio outside (0, 1] or a negative scale.
    """
    scales = (positive_low, negative_high, positive_high, negative_low)
    return shaped(advantages, outcomes, entropies, mask, ratio, scales, threshold)


def shaped(
    advantages: Tensor,
    outcomes: Tensor,
    metric: Tensor,
    mask: Tensor,
    ratio: float,
    scales: tuple[float, float, float, float],
    threshold: float,
) -> Tensor:
    """Advantages [B, T] under the four rules: positive low, negative high, positive high, negative low."""
    if not 0 < ratio <= 1 or min(scales) < 0:
        raise ValueError(f"a3po needs a ratio in (0, 1] and scales >= 0, got ratio={ratio}, scales={scales}")
    right, wrong = outcomes > threshold, outcomes <= threshold
    low, high = (extreme_tokens(metric, mask, ratio, largest=largest) for largest in (False, True))
    out = where_mask(advantages.detach(), mask)
    rules = ((right, low), (wrong, high), (right, high), (wrong, low))
    for (rows, chosen), scale in zip(rules, scales, strict=True):
        out = torch.where(rows[:, None] & chosen, scale * out, out)
    return out


def extreme_tokens(metric: Tensor, mask: Tensor, ratio: float, *, largest: bool) -> Tensor:
    """bool [B, T]: in each row the max(1, floor(n ratio)) sampled tokens with the largest (or smallest) metric.

    >>> extreme_tokens(torch.tensor([[0.3, 0.1, 0.2]]), torch.ones(1, 3, dtype=torch.bool), 0.5, largest=False)
    tensor([[False,  True, False]])
    """
    filled = where_mask(metric.detach(), mask, float("-inf") if largest else float("inf"))
    ranks = filled.argsort(dim=-1, descending=largest, stable=True).argsort(-1)
    number = (mask.sum(-1, keepdim=True).double() * ratio).floor().clamp(min=1)
    chosen: Tensor = mask & (ranks < number)
    return chosen


@part("a3po/polarity", stage="advantage", scope="row", paper="arXiv:2512.21625")
def polarity(
    rewards: Tensor,
    outcomes: Tensor,
    mask: Tensor,
    *,
    positive: float = 1.0,
    negative: float = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """Advantages [B, T] without a baseline: `positive` * R in right rows, `negative` * (R - 1) in wrong ones."""
    value = torch.where(outcomes > threshold, positive * rewards, negative * (rewards - 1))
    known = ~(outcomes.isnan() | rewards.isnan())
    return to_tokens(where_mask(value, known), mask)


@part("a3po/weighted", stage="credit", scope="row", paper="arXiv:2512.21625")
def weighted(
    advantages: Tensor,
    outcomes: Tensor,
    mask: Tensor,
    *,
    positive: float = 1.0,
    negative: float = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """Advantages [B, T] times `positive` in right rows and `negative` in wrong ones ("PxNy")."""
    factor = torch.where(outcomes > threshold, positive, negative).to(advantages.dtype)
    return where_mask(advantages.detach(), mask) * factor[:, None]


@preset("a3po", paper="arXiv:2512.21625")
def a3po_preset(
    *,
    base: Literal["grpo", "dapo"] = "grpo",
    metric: Literal["probability", "entropy"] = "probability",
    ratio: float = 0.2,
    scale: float | None = None,
) -> Algorithm:
    """GRPO (no KL, sequence mean) or DAPO with shaped tokens. `scale=None` falls from 2 to 1 over 100 steps."""
    size: Any = Schedule("linear", 2.0, 1.0, steps=100) if scale is None else scale
    credit = {"part": "a3po", "ratio": ratio, "positive_low": size, "negative_high": size}
    if metric == "entropy":
        credit = {"part": "a3po/entropy", "ratio": ratio, "positive_high": size, "negative_low": size}
    recipe: dict[str, Any] = {"preset": "grpo", "kl_coef": 0.0} if base == "grpo" else {"preset": base}
    return Algorithm.from_recipe(recipe).override(credit=[credit])
