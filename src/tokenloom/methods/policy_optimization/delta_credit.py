"""DelTA: weight tokens so that the gradients of right and wrong rows part (arXiv 2605.21467).

Over the whole batch, without gradient, with h the input of the model's head and a the advantages:
v = (1 - exp(old_logprob)) h, a proxy of the token's gradient                             [B, T, D]
mu+- = sum a+- v / sum a+-, a+ = max(a, 0), a- = max(-a, 0);  d+- = |v - mu+-|^2
margin m = d- - d+ for tokens with a > 0, d+ - d- for a < 0;  gamma+- = population std of m over that side
K times: q = sigmoid(m / gamma), centroids anew with weights q |a|; gamma is that of the margins just used
w = lambda_min + (lambda_max - lambda_min) sigmoid(m / gamma), lambda_min where a = 0, then divided by its mean
A' = w A. If one side is empty there is nothing to part and w = 1 (the released code measures distances to 0).
Identical v everywhere have margin 0 and q = 1/2. Deviations: the metric is the identity, as in the released code.
Limit: lambda_min = lambda_max is the base, DAPO. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.signals import chunk_signal

PAPER = "arXiv:2605.21467"


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, 4, generator=generator, dtype=torch.float64)


@chunk_signal("head_inputs", "hidden", example=_example)
def head_inputs(hidden: Tensor) -> Tensor:
    """[N, D] float32: the state that predicts the token, as the head sees it."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()


@part("delta-credit", stage="credit", scope="batch", paper=PAPER)
def discriminative(
    advantages: Tensor, head_inputs: Tensor, old_logprobs: Tensor, mask: Tensor,
    *, iterations: int = 1, low: float = 0.8, high: float = 1.2,
) -> Tensor:  # fmt: skip
    """Advantages [B, T] times weights of mean 1 over the sampled tokens.

    Raises:
        ValueError: unless 0 <= low <= high, high > 0 and iterations >= 0.
    """
    if not (0 <= low <= high and high > 0 and iterations >= 0):
        raise ValueError(f"needs 0 <= low <= high, high > 0 and iterations >= 0, got {low}, {high}, {iterations}")
    weights = token_weights(
        advantages[mask], head_inputs[mask].detach().to(advantages.dtype), old_logprobs[mask].detach(),
        iterations=iterations, low=low, high=high,
    )  # fmt: skip
    out = torch.zeros_like(advantages)
    out[mask] = weights * advantages[mask]
    return where_mask(out, mask)


def token_weights(
    advantages: Tensor, hidden: Tensor, logprobs: Tensor, *, iterations: int, low: float, high: float
) -> Tensor:
    """Weights [N] of mean 1 for `advantages`, `logprobs` [N] and `hidden` [N, D]."""
    positive, negative = advantages > 0, advantages < 0
    if low == high or not (bool(positive.any()) and bool(negative.any())):
        return torch.ones_like(advantages)
    v = (1 - logprobs.exp())[:, None] * hidden
    gate = torch.ones_like(advantages)
    for step in range(iterations + 1):
        margin = _distance(v, negative * gate * advantages.abs()) - _distance(v, positive * gate * advantages.abs())
        margin = torch.where(negative, -margin, margin)
        spread = torch.where(positive, _std(margin[positive]), _std(margin[negative]))
        if step < iterations:
            gate = torch.sigmoid(margin / spread)
    weights = low + (high - low) * torch.sigmoid(margin / spread)
    weights = torch.where(advantages == 0, torch.full_like(weights, low), weights)
    return weights / weights.mean()


def _distance(v: Tensor, weight: Tensor) -> Tensor:
    """Squared distance [N] to the weighted mean of `v` [N, D], without an [N, D] difference."""
    center = (weight[:, None] * v).sum(0) / weight.sum().clamp(min=1e-8)
    return (v * v).sum(-1) - 2 * (v @ center) + center @ center


def _std(margin: Tensor) -> Tensor:
    return (margin.var(correction=0) + 1e-8).sqrt()


@preset("delta-credit", paper=PAPER)
def delta_credit_preset(*, iterations: int = 1, low: float = 0.8, high: float = 1.2) -> Algorithm:
    """DAPO with DelTA's weights on the advantages."""
    credit = {"part": "delta-credit", "iterations": iterations, "low": low, "high": high}
    return Algorithm.from_recipe("dapo").override(credit=[credit])
