"""TIS: truncated importance weights against the sampling engine's own law (Yao et al. 2025, blog; verl, TRL).

w = exp(old_logprobs - sampler_logprobs) per token, or exp of its sum over the row; w <- clip(w, min, max)
weights = w, detached                                                                 [B, T] >= 0
The policy term is multiplied, KL terms are not. A missing (NaN) sampler log-prob counts as ratio 1.
normalize divides by the mean weight of the batch, over sampled tokens or over rows, as `level` says (verl).
Equal engines give 1. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import LOG_RATIO_LIMIT, masked_mean, where_mask


@part("tis", stage="weight", scope="batch", paper="Yao et al. 2025")
def tis(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    minimum: float | None = None,
    maximum: float | None = 2.0,
    normalize: bool = False,
) -> Tensor:
    """Truncated weights [B, T], zero off the mask; bounds are inclusive.

    Raises:
        ValueError: unless minimum < maximum.

    >>> one, old = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.4, 1.0, 3.0]]).log()
    >>> tis(old, torch.zeros(1, 3), one)
    tensor([[0.4000, 1.0000, 2.0000]])
    """
    check_interval("tis", minimum, maximum)
    ratio = mismatch_ratio(old_logprobs, sampler_logprobs, mask, level)
    if minimum is not None or maximum is not None:
        ratio = ratio.clamp(minimum, maximum)
    return normalized(ratio, mask, level, normalize)


def mismatch_ratio(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, level: Literal["token", "sequence"]
) -> Tensor:
    """Training law over sampling law of each token, or of each row on all its tokens: [B, T], detached."""
    gap = where_mask(old_logprobs.detach(), mask) - where_mask(sampler_logprobs.detach(), mask)
    gap = torch.where(gap.isnan(), torch.zeros_like(gap), gap)
    if level == "sequence":
        gap = gap.sum(-1, keepdim=True).expand(mask.shape)
    return gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def normalized(ratio: Tensor, mask: Tensor, level: Literal["token", "sequence"], normalize: bool) -> Tensor:
    """The weights [B, T] on the mask, divided by their mean over tokens or rows when `normalize`."""
    if normalize:
        mean = masked_mean(ratio, mask)
        if level == "sequence":
            mean = masked_mean(masked_mean(ratio, mask, -1), mask.any(-1))
        ratio = ratio / mean.clamp(min=torch.finfo(ratio.dtype).tiny)
    return where_mask(ratio, mask)


def check_interval(name: str, minimum: float | None, maximum: float | None) -> None:
    """Refuse an interval of ratios that holds nothing."""
    if minimum is not None and maximum is not None and minimum >= maximum:
        raise ValueError(f"{name}: minimum = {minimum} must lie below maximum = {maximum}; null means no limit")


@preset("tis", paper="Yao et al. 2025")
def tis_preset(*, level: Literal["token", "sequence"] = "token", maximum: float = 2.0) -> Algorithm:
    """GRPO (no KL, token mean) with truncated importance weights for the sampler's mismatch."""
    weight = {"part": "tis", "level": level, "maximum": maximum}
    return Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="token-mean", weight=[weight])
