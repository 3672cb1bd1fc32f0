"""CISPO: cap the importance weight, keep every token's gradient (arXiv 2506.13585, eq. 4-5).

objective_t = sg(clip(ratio_t, lo, hi)) * A_t * logprob_t                            [B, T], to maximize
Deviations: none. Limit: lo -> 0, hi -> inf has the gradient of `importance`. Fidelity: code.

MiniMax-M1 uses an upper limit only. Dialects: "trl" (and ScaleRL) reads `high` as an absolute cap of the
ratio, 5.0; "verl" clips to [1 - low, 1 + high] with PPO's 0.2.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp, where_mask
from tokenloom.methods.policy_optimization.importance import where_advantages
from tokenloom.methods.policy_optimization.ppo_clip import Limit, bounded


def _multiplier(ratio: Tensor, lo: Limit, hi: Limit) -> Tensor:
    return bounded(ratio, lo, hi)


@part("cispo", stage="surrogate", scope="token", paper="arXiv:2506.13585", multiplier=_multiplier)
def cispo(
    log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, mask: Tensor, lo: Limit = 0.0, hi: Limit = 5.0
) -> Tensor:
    """Objective [B, T], zero off the mask. `lo`, `hi` are absolute limits of the detached ratio."""
    weight = bounded(clamped_exp(log_ratio.detach(), mask), lo, hi)
    return weight * where_advantages(advantages, mask) * where_mask(logprobs, mask)


@preset("cispo", paper="arXiv:2506.13585")
def cispo_preset(*, dialect: Literal["paper", "trl", "verl"] = "paper", high: float | None = None) -> Algorithm:
    """CISPO with GRPO's advantage and the token mean; `high=None` takes the dialect's limit."""
    bounds: dict[str, Any] = {"part": "clip/caps", "hi": 5.0 if high is None else high}
    if dialect == "verl":
        bounds = {"part": "clip", "low": 0.2, "high": 0.2 if high is None else high}
    return Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-4 if dialect == "trl" else 1e-6},
        surrogate="cispo",
        bounds=bounds,
        aggregate="token-mean",
    )
