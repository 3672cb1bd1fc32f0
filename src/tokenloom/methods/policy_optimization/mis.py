"""MIS (IcePop): drop tokens or rows whose sampling law strays too far from the training law (Yao et al. 2025; TRL).

w = exp(old_logprobs - sampler_logprobs); weights = w where min <= w <= max, else 0      [B, T], detached
As TIS, but outliers lose their gradient instead of being truncated. Bounds are inclusive. Equal engines give 1.
TRL's default is level="sequence", maximum=3, no minimum (dialect "trl"). Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.tis import check_interval, mismatch_ratio, normalized


@part("mis", stage="weight", scope="batch", paper="Yao et al. 2025")
def mis(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    minimum: float | None = 0.5,
    maximum: float | None = 2.0,
    normalize: bool = False,
) -> Tensor:
    """Masked importance weights [B, T], zero off the mask.

    Raises:
        ValueError: unless minimum < maximum.

    >>> import torch
    >>> one, old = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.4, 1.0, 3.0]]).log()
    >>> mis(old, torch.zeros(1, 3), one)
    tensor([[0., 1., 0.]])
    """
    check_interval("mis", minimum, maximum)
    ratio = mismatch_ratio(old_logprobs, sampler_logprobs, mask, level)
    inside = mask
    if minimum is not None:
        inside = inside & (ratio >= minimum)
    if maximum is not None:
        inside = inside & (ratio <= maximum)
    return normalized(where_mask(ratio, inside), mask, level, normalize)


@preset("mis", paper="Yao et al. 2025")
def mis_preset(*, dialect: Literal["icepop", "trl"] = "icepop") -> Algorithm:
    """GRPO (no KL, token mean) with masked importance weights for the sampler's mismatch."""
    weight: dict[str, Any] = {"part": "mis"}
    if dialect == "trl":
        weight |= {"level": "sequence", "minimum": None, "maximum": 3.0}
    advantage = {"part": "grpo", "eps": 1e-4 if dialect == "trl" else 1e-6}
    return Algorithm.compose(advantage=advantage, surrogate="ppo-clip", aggregate="token-mean", weight=[weight])
