"""Temporal scheduling: where credit goes is annealed over the run (arXiv 2605.25381).

progress x = clip((step / total - begin) / (end - begin), 0, 1); rho falls from about `start` to 0 as
linear  start (1 - x)       sigmoid  start (s(x) - s(1)) / (s(0) - s(1)), s(x) = 1 / (1 + exp(8 (x - 1/2)))
gamma   (start (1 - x))^2
1. trajectory: the first min(floor(len rho), len - 1) sampled tokens of a row are context, only the rest is trained.
2. forking: only the ceil((1 - rho) len) tokens of a row with the highest entropy are trained.
3. entropy-advantage: A' = A + rho min(alpha H, |A| / kappa), H in nats; it keeps A's sign for kappa > 1.     [B, T]
Untrained tokens leave the normalizer, and at least one token of a row is trained. rho = 0 is the base algorithm:
GRPO with the token mean, clip 0.2 / 0.28, no KL. A run without an end has no progress and stays at the
beginning. alpha and kappa are the scripts' 0.4 and 2. Deviations: context is masked by weights, which is the same for
token ratios; a sequence ratio would still see it. Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.top_tokens import counted_up, top_by_row

Curve = Literal["linear", "sigmoid", "gamma"]
_PAPER = "arXiv:2605.25381"


def magnitude(
    step: int,
    total_steps: int | None,
    curve: Curve = "linear",
    start: float = 0.99,
    begin: float = 0.0,
    end: float = 0.8,
) -> float:
    """rho at a step (0-based) of a run of `total_steps`.

    Raises:
        ValueError: unless 0 <= start <= 1 and 0 <= begin < end.

    >>> [round(magnitude(step, 100, "sigmoid"), 4) for step in (0, 20, 40, 80)]
    [0.99, 0.8861, 0.495, 0.0]
    """
    if not (0 <= start <= 1 and 0 <= begin < end):
        raise ValueError(f"a schedule needs 0 <= start <= 1 and 0 <= begin < end, got {start=}, {begin=}, {end=}")
    x = min(max((step / total_steps if total_steps else 0.0) - begin, 0.0) / (end - begin), 1.0)
    if curve == "linear":
        return start * (1 - x)
    if curve == "gamma":
        return (start * (1 - x)) ** 2
    first, here, last = (1 / (1 + math.exp(8 * (y - 0.5))) for y in (0.0, x, 1.0))
    return start * (here - last) / (first - last)


@part("temporal-scheduling/trajectory", stage="weight", scope="row", paper=_PAPER)
def trajectory(
    advantages: Tensor,
    mask: Tensor,
    step: int,
    total_steps: int | None,
    *,
    curve: Curve = "linear",
    start: float = 0.99,
    begin: float = 0.0,
    end: float = 0.8,
) -> Tensor:
    """Weights [B, T]: 0 on the first part of each row, 1 on its tail, which grows to the whole row."""
    rho = magnitude(step, total_steps, curve, start, begin, end)
    length = mask.sum(-1, keepdim=True).double()
    context = torch.minimum((length * rho).floor(), length - 1)
    return (mask & (mask.cumsum(-1) > context)).to(advantages.dtype)


@part("temporal-scheduling/forking", stage="weight", scope="row", paper=_PAPER)
def forking(
    entropies: Tensor,
    mask: Tensor,
    step: int,
    total_steps: int | None,
    *,
    curve: Curve = "linear",
    start: float = 0.99,
    begin: float = 0.0,
    end: float = 0.8,
) -> Tensor:
    """Weights [B, T]: 1 on each row's tokens of highest entropy, a share 1 - rho of them, else 0."""
    share = 1 - magnitude(step, total_steps, curve, start, begin, end)
    return top_by_row(entropies, mask, counted_up(share, mask)).to(entropies.dtype)


@part("temporal-scheduling/entropy-advantage", stage="credit", scope="token", paper=_PAPER)
def entropy_advantage(
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    step: int,
    total_steps: int | None,
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
    curve: Curve = "linear",
    start: float = 0.99,
    begin: float = 0.0,
    end: float = 0.8,
) -> Tensor:
    """Advantages [B, T] plus a fading entropy bonus, at most |A| / kappa.

    Raises:
        ValueError: for a kappa that is not positive.
    """
    if kappa <= 0:
        raise ValueError(f"the bonus is at most |A| / kappa, so kappa must be positive, got {kappa}")
    rho = magnitude(step, total_steps, curve, start, begin, end)
    bonus = torch.minimum(alpha * entropies.detach(), advantages.abs() / kappa)
    return where_mask(advantages + rho * bonus, mask)


@preset("temporal-scheduling", paper=_PAPER)
def temporal_scheduling_preset(
    *,
    where: Literal["trajectory", "forking", "entropy-advantage"] = "trajectory",
    curve: Curve = "linear",
    start: float = 0.99,
    begin: float = 0.0,
    end: float = 0.8,
) -> Algorithm:
    """GRPO whose trained tokens (or entropy bonus) follow a schedule over the run."""
    spec: dict[str, Any] = {
        "part": f"temporal-scheduling/{where}", "curve": curve, "start": start, "begin": begin, "end": end,
    }  # fmt: skip
    base = Algorithm.compose(
        advantage="grpo",
        surrogate="ppo-clip",
        bounds={"part": "clip", "low": 0.2, "high": 0.28},
        aggregate="token-mean",
    )
    if where == "entropy-advantage":
        return base.override(credit=[spec])
    return base.override(weight=[spec], aggregate={"count": "weights"})
