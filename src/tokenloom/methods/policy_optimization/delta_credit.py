"""DelTA: weight tokens so that the gradients of right and wrong rows part (arXiv 2605.21467).

Over the whole batch, without gradient, with h the input of the model's head and a the advantages:
v = (1 - exp(old_logprob)) h, a proxy of the token's gradient                             [B, T, D]
mu+- = sum a+- v / sum a+-, a+ = max(a, 0), a- = max(-a, 0);  d+- = |v - mu+-|^2
margin m = d- - d+ for tokens with a > 0, d+ - d- for a < 0;  gamma+- = population std of m over that side
K times: q = sigmoid(m / gamma), then gamma from these m, and centroids and m anew with weights q |a|: so gamma is
always that of the margins before the last centroids, as in the released code
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
from tokenloom.signals import chunk_signal

PAPER = "arXiv:2605.21467"


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, 4, generator=generator, dtype=torch.float64)


@chunk_signal("head_inputs", "hidden", example=_example)
def head_inputs(hidden: Tensor) -> Tensor:
    """[N, D], at least float32: the state that predicts the token, as the head sees it."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()


@part("delta-credit", stage="credit", scope="batch", paper=PAPER)
def discriminative(
    advantages: Tensor, head_inputs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor | None = None,
    *, iterations: int = 1, low: float = 0.8, high: float = 1.2,
) -> Tensor:  # fmt: skip
    """Advantages [B, T] times weights of mean 1 over the sampled tokens; rows without a reward are left out.

    Raises:
        ValueError: unless 0 <= low <= high, high > 0 and iterations >= 0.
    """
    if not (0 <= low <= high and high > 0 and iterations >= 0):
        raise ValueError(f"needs 0 <= low <= high, high > 0 and iterations >= 0, got {low}, {high}, {iterations}")
    if rewards is not None:
        mask = mask & ~rewards.isnan()[:, None]
    own = advantages[mask]
    hidden, logprobs = (x[mask].detach().to(own.dtype) for x in (head_inputs, old_logprobs))
    out = torch.zeros_like(advantages)
    out[mask] = own * token_weights(own, hidden, logprobs, iterations=iterations, low=low, high=high)
    return out


def token_weights(
    advantages: Tensor, hidden: Tensor, logprobs: Tensor, *, iterations: int, low: float, high: float
) -> Tensor:
    """Weights [N] of mean 1 for `advantages`, `logprobs` [N] and `hidden` [N, D]."""
    positive, negative = advantages > 0, advantages < 0
    if low == high or not (bool(positive.any()) and bool(negative.any())):
        return torch.ones_like(advantages)
    v = (1 - logprobs.exp())[:, None] * hidden
    share, spread = torch.ones_like(advantages), None
    for _ in range(iterations + 1):
        weight = share * advantages.abs()
        margin = _nearer(v, _center(v, weight * positive), _center(v, weight * negative))
        margin = torch.where(negative, -margin, margin)
        measured = torch.where(positive, _std(margin[positive]), _std(margin[negative]))
        share, spread = torch.sigmoid(margin / (measured if spread is None else spread)), measured
    weights = torch.where(advantages == 0, torch.full_like(share, low), low + (high - low) * share)
    return weights / weights.mean()


def _center(v: Tensor, weight: Tensor) -> Tensor:
    return (weight @ v) / weight.sum().clamp(min=1e-8)


def _nearer(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|v - b|^2 - |v - a|^2 [N], without the squares of v, which would drown it in rounding."""
    return 2 * (v @ (a - b)) - (a + b) @ (a - b)


def _std(margin: Tensor) -> Tensor:
    return margin.var(correction=0).clamp(min=1e-8).sqrt()


@preset("delta-credit", paper=PAPER)
def delta_credit_preset(*, iterations: int = 1, low: float = 0.8, high: float = 1.2) -> Algorithm:
    """DAPO with DelTA's weights on the advantages."""
    credit = {"part": "delta-credit", "iterations": iterations, "low": low, "high": high}
    return Algorithm.from_recipe("dapo").override(credit=[credit])
