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
from tokenloom.methods.policy_optimization.tis import mismatch_ratio, normalized


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
    """Masked importance weights [B, T], zero off the mask."""
    ratio = mismatch_ratio(old_logprobs, sampler_logprobs, mask, level)
    inside = mask
    if minimum is not None:
        inside = inside & (ratio >= minimum)
    if maximum is not None:
        inside = inside & (ratio <= maximum)
    return normalized(where_mask(ratio, inside), mask, normalize)


@preset("mis", paper="Yao et al. 2025")
def mis_preset(*, dialect: Literal["icepop", "trl"] = "icepop") -> Algorithm:
    """GRPO (no KL, token mean) with masked importance weights for the sampler's mismatch."""
    weight: dict[str, Any] = {"part": "mis"}
    if dialect == "trl":
        weight |= {"level": "sequence", "minimum": None, "maximum": 3.0}
    return Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="token-mean", weight=[weight])
