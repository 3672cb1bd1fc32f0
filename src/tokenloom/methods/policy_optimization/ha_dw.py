"""HA-DW: right answers count more on prompts that are hard for the model as it is now (arXiv 2601.08521, eq. 7-17).

A' = lambda * exp(-sign(A) (p - C)) * A, p = the group's mean outcome, C = the anchor   [B, T]
The anchor is a belief about the model's accuracy, carried from step to step: C <- (1 - eta_t) C + eta_t y after each
batch of accuracy y, with eta_t = eta * sigma_t, sigma_t the standard deviation of the last `window` beliefs. Prompts
are compared with the belief before the update (eq. 13). anchor="window" is the released code's: C = mean accuracy of
the last `window` batches, the present one included. The first batch is its own anchor.
Why: a group that is kept because its answers differ overestimates p on hard prompts and underestimates it on easy
ones (`baseline_bias`); the metric `bias` is its mean size over the batch's mixed groups, with p in place of the truth.

Deviations: with fewer than two beliefs sigma = 1. `floor` bounds sigma from below, because beliefs that barely move
make sigma, and with it eta_t, vanish: without it the anchor freezes. lambda = 1.3 is the paper's best; eta, window
and floor are not given there. Limit: p = C and lambda = 1 change nothing. Fidelity: paper (belief), code (window).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_constant, group_mean, group_size, masked_mean, where_mask


@part("ha-dw", stage="credit", scope="batch", paper="arXiv:2601.08521")
def ha_dw(
    advantages: Tensor,
    outcomes: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    state: Mapping[str, Any] | None,
    *,
    scale: float = 1.3,
    anchor: Literal["belief", "window"] = "belief",
    window: int = 50,
    eta: float = 0.1,
    floor: float = 0.1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`advantages` [B, T] and `metrics`; the state holds the beliefs, or accuracies, of the last `window` steps.

    Raises:
        ValueError: for a scale that is not positive, an empty window, or a negative eta or floor.
    """
    if scale <= 0 or window < 1 or min(eta, floor) < 0:
        raise ValueError(
            "ha-dw needs scale > 0, window >= 1, eta >= 0 and floor >= 0, got "
            f"scale={scale}, window={window}, eta={eta}, floor={floor}"
        )
    scored = ~outcomes.isnan()
    held: list[float] = list((state or {}).get("history", []))
    accuracy = float(masked_mean(outcomes, scored)) if bool(scored.any()) else None
    level, history = _anchor(held, accuracy, anchor, window, eta, floor)
    rate = group_mean(outcomes, group_ids, scored)
    a = where_mask(advantages.detach(), mask)
    difference = (rate - level)[:, None]
    metrics = {"anchor": level, "bias": _mean_bias(rate, outcomes, group_ids, scored)}
    return {"advantages": scale * torch.exp(-a.sign() * difference) * a, "metrics": metrics}, {"history": history}


def updated_belief(belief: float, accuracy: float, sigma: float, eta: float) -> float:
    """The belief after a batch: eta * sigma of the way to its accuracy, all of it at most.

    >>> round(updated_belief(0.5, 0.7, 0.2, 0.1), 9)
    0.504
    """
    step = min(eta * sigma, 1.0)
    return (1 - step) * belief + step * accuracy


def conditional_mean(p: Tensor, size: Tensor | int) -> Tensor:
    """Expected mean of `size` Bernoulli(p) outcomes given that not all are equal; 0 < p < 1, size >= 2.

    >>> conditional_mean(torch.tensor(0.25), 4)
    tensor(0.3621)
    """
    return p * (1 - p ** (size - 1)) / (1 - (1 - p) ** size - p**size)


def baseline_bias(p: Tensor, size: Tensor | int) -> Tensor:
    """What the advantage R - mean misses in a mixed group, on average: positive on hard prompts, 0 at p = 1/2."""
    return conditional_mean(p, size) - p


def _anchor(
    held: list[float], accuracy: float | None, anchor: str, window: int, eta: float, floor: float
) -> tuple[float, list[float]]:
    """What prompts are compared with, and what to hold on to; a batch without accuracy teaches nothing."""
    if accuracy is None:
        return (statistics.fmean(held) if anchor == "window" else held[-1]) if held else 0.0, held
    if anchor == "window":
        recent = [*held, accuracy][-window:]
        return statistics.fmean(recent), recent
    if not held:
        return accuracy, [accuracy]
    sigma = statistics.pstdev(held) if len(held) > 1 else 1.0
    return held[-1], [*held, updated_belief(held[-1], accuracy, max(sigma, floor), eta)][-window:]


def _mean_bias(rate: Tensor, outcomes: Tensor, group_ids: Tensor, scored: Tensor) -> float:
    mixed = scored & ~group_constant(outcomes, group_ids, scored) & (rate > 0) & (rate < 1)
    if not bool(mixed.any()):
        return 0.0
    size = group_size(group_ids, scored)[mixed]
    share = 1 / size.to(rate.dtype)
    return float((baseline_bias(rate[mixed], size).abs() * share).sum() / share.sum())


@preset("ha-dw", paper="arXiv:2601.08521")
def ha_dw_preset(
    *, base: Literal["grpo", "gspo", "dapo"] = "grpo", dialect: Literal["paper", "code"] = "paper"
) -> Algorithm:
    """GRPO (no KL), GSPO or DAPO with difficulty weighting. Dialect "code": mean of 10 batches, lambda 1.5."""
    recipe: dict[str, Any] = {"preset": "grpo", "kl_coef": 0.0} if base == "grpo" else {"preset": base}
    credit: dict[str, Any] = {"part": "ha-dw"}
    if dialect == "code":
        credit |= {"anchor": "window", "window": 10, "scale": 1.5}
    return Algorithm.from_recipe(recipe).override(credit=[credit])
