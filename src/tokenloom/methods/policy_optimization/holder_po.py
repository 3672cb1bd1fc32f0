"""HölderPO: the sequence ratio is a power mean of the token ratios, its exponent annealed (arXiv 2605.12058).

log rho_i = log(mean_t r_t^p) / p, and mean_t log r_t for p -> 0                        [B, T], the same along a row
d rho / d logprob_t = rho r_t^p / sum_u r_u^p: p > 0 concentrates on the tokens that rose, p < 0 on those that fell.
The paper goes from p = 2 to -2 over 500 steps. `clip` first clamps log r_t to +-log(1 + clip) ("clip both").
`holder-po/token` clips instead of the mean each ratio on the side of its advantage, m_t = min(r_t, hi) or
max(r_t, lo), and takes the power mean M of m: objective_t = A_t M, gradient A_t M (m_t / M)^p [inside]. For an
advantage that is constant along the row this is the gradient of A M; where it is not, each token answers to its own.

Any schedule of p works: the released ones are `Schedule`'s linear, cosine, power and cubic with start and end.
Deviations: means in log space around the extreme term (also exact near p = 0), without the released code's 1e-8.
Limits: p = 0 is GSPO (with token clips GMPO); unclipped p = 1 has GRPO's gradient under the sequence mean.
Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp, masked_mean, where_mask
from tokenloom.methods.policy_optimization.clip import INFINITY
from tokenloom.methods.policy_optimization.importance import where_advantages
from tokenloom.methods.policy_optimization.ppo_clip import Limit, bounded
from tokenloom.methods.policy_optimization.token_ratio import token_ratio
from tokenloom.schedule import Schedule

_GEOMETRIC = 1e-6
"""Exponents this close to 0 take the geometric mean, as in the released code."""


@part("holder-po", stage="log_ratio", scope="row", paper="arXiv:2605.12058")
def holder_po(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, p: float = 1.0, clip: float | None = None
) -> Tensor:
    """Log-ratio [B, T], constant along each row's sampled tokens, zero off the mask.

    Raises:
        ValueError: for a `clip` that is not positive.

    >>> one, zero = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3)
    >>> holder_po(torch.tensor([[0.5, 1.0, 2.0]]).log(), zero, one, p=-1.0).exp()
    tensor([[0.8571, 0.8571, 0.8571]])
    """
    ratios = token_ratio(logprobs, old_logprobs, mask)
    if clip is not None:
        if clip <= 0:
            raise ValueError(f"clip is a distance of the token ratios from 1 and must be positive, got {clip}")
        width = math.log1p(clip)
        ratios = ratios.clamp(-width, width)
    return where_mask(log_power_mean(ratios, mask, p).expand(mask.shape), mask)


def _token_multiplier(
    ratio: Tensor, advantages: Tensor, mask: Tensor, lo: Limit, hi: Limit, *, p: float = 1.0
) -> Tensor:
    log_held = where_mask(_held(ratio, advantages, lo, hi), mask, 1.0).log()
    inside = torch.where(advantages < 0, ratio >= lo, ratio <= hi)
    return where_mask(_pull(log_held, log_power_mean(log_held, mask, p), p), inside)


@part("holder-po/token", stage="surrogate", scope="row", paper="arXiv:2605.12058", multiplier=_token_multiplier)
def token_clipped(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, lo: Limit = 0.8, hi: Limit = 1.2, *, p: float = 1.0
) -> Tensor:
    """Objective [B, T], zero off the mask, from token ratios; use with `log_ratio: token-ratio`."""
    a = where_advantages(advantages, mask)
    log_held = where_mask(_held(clamped_exp(log_ratio, mask), a, lo, hi), mask, 1.0).log()
    log_mean = log_power_mean(log_held.detach(), mask, p)
    moved = log_held - log_held.detach()
    return a * (log_mean.exp() + _pull(log_held.detach(), log_mean, p) * moved)


def log_power_mean(log_values: Tensor, mask: Tensor, p: float) -> Tensor:
    """Logarithm of the mean of exp(log_values)^p to the power 1/p over the mask, [B, 1], with gradient; 0 without any.

    >>> log_power_mean(torch.tensor([[0.5, 1.0, 2.0]]).log(), torch.ones(1, 3, dtype=torch.bool), 2.0).exp()
    tensor([[1.3229]])
    """
    if abs(p) < _GEOMETRIC:
        return masked_mean(log_values, mask, -1)[:, None]
    if mask.shape[1] == 0:
        return log_values.new_zeros(len(mask), 1)
    values = where_mask(log_values, mask)
    # The term that dominates, so that no power overflows; log1p and expm1 keep the digits that p -> 0 would cancel.
    extreme = where_mask(log_values.detach(), mask, math.copysign(INFINITY, -p))
    top = extreme.amax(-1, keepdim=True) if p > 0 else extreme.amin(-1, keepdim=True)
    top = where_mask(top, mask.any(-1, keepdim=True))
    return top + masked_mean(where_mask(p * (values - top), mask).expm1(), mask, -1)[:, None].log1p() / p


def _held(ratio: Tensor, advantages: Tensor, lo: Limit, hi: Limit) -> Tensor:
    """The ratio clipped on the side that its advantage pushes to."""
    return torch.where(advantages < 0, bounded(ratio, lo, INFINITY), bounded(ratio, 0.0, hi))


def _pull(log_held: Tensor, log_mean: Tensor, p: float) -> Tensor:
    """M (m_t / M)^p: the row's tokens times the derivative of the power mean by log m_t."""
    return (log_mean + p * (log_held - log_mean)).exp()


@preset("holder-po", paper="arXiv:2605.12058")
def holder_po_preset(
    *, variant: Literal["sequence", "token", "both"] = "sequence", p: float | None = None, clip: float = 0.2
) -> Algorithm:
    """GRPO's advantage, power-mean ratio, PPO's clip, mean over rows, no KL. `p=None` anneals from 2 to -2 in 500
    steps; `variant` says where to clip: the mean, the tokens, or both.
    """
    exponent: Any = Schedule("linear", 2.0, -2.0, steps=500) if p is None else p
    algorithm = Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-8},
        log_ratio={"part": "holder-po", "p": exponent, "clip": clip if variant == "both" else None},
        bounds={"part": "clip", "low": clip, "high": clip},
        aggregate="sequence-mean",
    )
    if variant != "token":
        return algorithm
    return algorithm.override(log_ratio="token-ratio", surrogate={"part": "holder-po/token", "p": exponent})
