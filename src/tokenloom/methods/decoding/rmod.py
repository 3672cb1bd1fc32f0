"""RMOD: blocks that are best under the worst weighting of several objectives (arXiv 2503.08796).

game       max_pi min_w  sum_g w_g E_pi[V_g] - KL(pi || pi_ref) / lam,    w in the simplex
weights    w* = argmin_w  mean_k exp(lam (A w)_k),    A [K, G] the values of K blocks drawn from pi_ref
solver     w = softmax(omega), omega_0 = 0; omega <- omega - eta / sqrt(i + 1) clip(gradient, -10, 10), i = 0 .. 9
selection  arg max_k (A w*)_k, or k ~ softmax(lam A w*)
values     several heads on hidden states of prefixes, trained to give the final rewards

Shapes: K blocks, G objectives, B responses, T tokens. Limits: G = 1 is blockwise controlled decoding, K = 1 plain
sampling; lam -> 0 weights the objective of the smallest mean value. Deviations: float32 at least (the release rounds
w to bfloat16); where the exponentials overflow, the gradient is that of the log of their mean, which has the same
minimizer. Ten steps do not reach it. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import where_mask

_CLIP = 10.0


@part("rmod", stage="search", scope="group", paper="arXiv:2503.08796")
def robust_weights(values: Tensor, *, lam: float = 1.0, iterations: int = 10, eta: float = 1.0) -> Tensor:
    """The weights [G] of the objectives that are worst for blocks of `values` [K, G]; float32 at least.

    Raises:
        ValueError: for lam or eta not above 0, less than one iteration, or values that are not finite.
    """
    if not lam > 0 or not eta > 0 or iterations < 1:
        raise ValueError(f"rmod: lam, eta and iterations must be above 0, got {lam}, {eta}, {iterations}")
    if values.ndim != 2 or not bool(values.isfinite().all()):
        raise ValueError(f"rmod: values must be finite numbers, blocks x objectives; got {values}")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    omega = values.new_zeros(values.shape[1])
    for i in range(iterations):
        w = omega.softmax(0)
        exponents = lam * (values @ w)
        tilted = exponents.exp() / len(values)
        if not bool((lam * (tilted @ values)).isfinite().all()):
            tilted = exponents.softmax(0)
        slope = lam * (tilted @ values)
        gradient = w * (slope - w @ slope)
        omega = omega - eta / (i + 1) ** 0.5 * gradient.clamp(-_CLIP, _CLIP)
    return omega.softmax(0)


@part("rmod/choice", stage="rank", scope="group", paper="arXiv:2503.08796")
def best_block(values: Tensor, weights: Tensor) -> int:
    """Index of the first block of the largest weighted value, `values` [K, G], `weights` [G]."""
    weighted = (values.to(weights.dtype) @ weights).tolist()
    return max(range(len(weighted)), key=lambda k: weighted[k])


@part("rmod/law", stage="search", scope="group", paper="arXiv:2503.08796")
def block_law(values: Tensor, weights: Tensor, *, lam: float = 1.0) -> Tensor:
    """The law [K] of the best response among blocks drawn from the reference, softmax of lam times weighted value."""
    return (lam * (values.to(weights.dtype) @ weights)).softmax(0)


@part("rmod/value-loss", stage="objective", scope="batch", paper="arXiv:2503.08796")
def value_loss(values: Tensor, rewards: Tensor, mask: Tensor, *, target: Literal["final", "td"] = "final") -> Tensor:
    """Mean squared error over the tokens of `mask` [B, T] and the objectives.

    Args:
        values: [B, T, G], the prediction after each token; 0 gradient off the mask.
        rewards: [B, G] of whole responses.
        mask: [B, T], true on each response's tokens, without gaps.
        target: "final", the rewards; or "td", the value one token later (no gradient), the rewards at the last token.

    Raises:
        ValueError: when the mask is empty.
    """
    if not bool(mask.any()):
        raise ValueError("rmod/value-loss: no token to learn from; the mask is empty")
    aim = rewards[:, None].expand_as(values)
    if target == "td":
        later = torch.cat((values.detach()[:, 1:], rewards[:, None]), 1)
        goes_on = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), 1)
        aim = torch.where(goes_on[..., None], later, aim)
    wide_mask = mask[..., None].expand_as(values)
    error = where_mask(values - aim, wide_mask)
    return error.square().sum() / wide_mask.sum()
