"""ASPO: the importance ratio of positive tokens is flipped, so that what has already risen pulls less
(arXiv 2510.06062).

A < 0: objective = A max(r, lo), but A cap logprob where max(r, lo) > cap               [B, T], to maximize
A >= 0: objective = A w with w = r' / sg(r')^2, r' = min(r, hi), but A cap logprob where 1 / sg(r') > cap
Gradient per A: [r >= lo] min(r, cap) for A < 0, [r <= hi] min(1/r, cap) for A > 0; exactly 1 on policy. The cap is
soft: it limits the weight of the gradient and never drops it. Values of the capped branch mean nothing.
Bounds: 1 -+ 0.2, and 1 -+ 0.4 on tokens whose entropy exceeds the row's 0.8-quantile (under the policy being trained).

Deviations: none from the released loss (Archer 2.0), whose name `high_entropy_mask` stands for the low-entropy
tokens. Limit: on policy the gradient of REINFORCE. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp, where_mask
from tokenloom.methods.policy_optimization.clip import INFINITY
from tokenloom.methods.policy_optimization.importance import where_advantages
from tokenloom.methods.policy_optimization.ppo_clip import Limit, bounded


def _multiplier(ratio: Tensor, advantages: Tensor, lo: Limit, hi: Limit, cap: Limit) -> Tensor:
    falling = torch.where(ratio >= lo, bounded(ratio, 0.0, cap), torch.zeros_like(ratio))
    rising = torch.where(ratio <= hi, bounded(1 / ratio, 0.0, cap), torch.zeros_like(ratio))
    return torch.where(advantages < 0, falling, rising)


@part("aspo", stage="surrogate", scope="token", paper="arXiv:2510.06062", multiplier=_multiplier)
def aspo(
    log_ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    lo: Limit = 0.8,
    hi: Limit = 1.2,
    cap: Limit = 3.0,
) -> Tensor:
    """Objective [B, T], zero off the mask. `cap` limits the ratio of negative and the inverse ratio of other tokens."""
    a, ratio, own = where_advantages(advantages, mask), clamped_exp(log_ratio, mask), where_mask(logprobs, mask)
    above, below = bounded(ratio, lo, INFINITY), bounded(ratio, 0.0, hi)
    inverse = 1 / below.detach()
    # Limited instead of multiplied by the cap itself, which may be infinite in the branch not taken.
    negative = torch.where(above > cap, bounded(above.detach(), 0.0, cap) * own, above)
    positive = torch.where(inverse > cap, bounded(inverse, 0.0, cap) * own, below * inverse**2)
    return a * torch.where(a < 0, negative, positive)


@part("aspo/entropy-bounds", stage="bounds", scope="row", paper="arXiv:2510.06062")
def entropy_bounds(
    entropies: Tensor,
    mask: Tensor,
    *,
    quantile: float = 0.8,
    low_entropy: float = 0.2,
    high_entropy: float = 0.4,
    cap: float = 3.0,
) -> tuple[Tensor, Tensor, float]:
    """Limits (lo, hi, cap): lo and hi [B, T] lie `high_entropy` from 1 above the row's quantile, else `low_entropy`.

    Raises:
        ValueError: for a quantile outside [0, 1], negative distances or a cap that is not above 1.
    """
    if not 0 <= quantile <= 1 or min(low_entropy, high_entropy) < 0 or cap <= 1:
        raise ValueError(
            "aspo needs a quantile in [0, 1], distances >= 0 and a cap above 1, got "
            f"quantile={quantile}, low_entropy={low_entropy}, high_entropy={high_entropy}, cap={cap}"
        )
    h = where_mask(entropies.detach(), mask)
    uncertain = mask & (h > row_quantile(h, mask, quantile))
    distance = torch.where(uncertain, torch.full_like(h, high_entropy), torch.full_like(h, low_entropy))
    return 1 - distance, 1 + distance, cap


def row_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linearly interpolated `q`-quantile of each row's sampled tokens: [B, 1]; infinite for a row without any.

    Sorting instead of `torch.nanquantile`, which refuses more than 2**24 values.
    """
    if x.shape[1] == 0:
        return x.new_full((len(x), 1), INFINITY)
    values = where_mask(x, mask, INFINITY).sort(-1).values
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    position = q * last.to(x.dtype)
    low = position.long()
    at_low, at_high = values.gather(-1, low), values.gather(-1, torch.minimum(low + 1, last))
    # Infinity minus infinity in a row of no tokens would be NaN.
    return torch.where(at_low == at_high, at_low, at_low + (position - low) * (at_high - at_low))


@preset("aspo", paper="arXiv:2510.06062")
def aspo_preset(*, epochs: int = 3, kl_coef: float = 1e-3) -> Algorithm:
    """GRPO's advantage, flipped ratios, entropy-dependent bounds, token mean, 3 epochs over a batch, k3 to the
    reference. In one epoch with one update all ratios are 1 and nothing is flipped.
    """
    algorithm = Algorithm.compose(
        advantage="grpo",
        surrogate="aspo",
        bounds="aspo/entropy-bounds",
        aggregate="token-mean",
        updates={"part": "mini-batches", "epochs": epochs},
    )
    return algorithm.with_term("kl", coef=kl_coef, estimator="k3") if kl_coef else algorithm
