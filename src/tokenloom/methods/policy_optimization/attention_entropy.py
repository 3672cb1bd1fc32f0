"""Attention entropy: anchors, whose attention is sharp, and explorers, whose attention is spread (arXiv 2605.07660).

E_t = -sum_j a_tj ln a_tj in nats, a_t the attention of the position that predicts token t, over the n tokens up to it:
"heads" averages the entropies of all heads and layers, "map" takes the entropy of their mean map, which is never
smaller. Both lie in [0, ln n]; `normalized` divides by ln n, so that late tokens do not look like explorers.
Subset: of each response only the share `fraction` with the lowest E (anchors), the highest (explorers) or a random one
(control) is trained; the aggregate's `count` says whether they alone ("weights") or all tokens are the normalizer.
Soft: weights = 1 + lam (1 - 2 rank), rank in [0, 1] rising with E within the row (ties share their mean rank), cut at 0
and divided by the row's mean. lam > 0 favors anchors, and may be a schedule:
`lam: {schedule: linear, start: 0.5, end: -0.1}` builds on anchors first and turns to explorers.          [B, T]
The geometry of gradients compares the gradient of a subset with the whole one. Limit: lam = 0 is the base, GRPO
without KL and the token mean. Fidelity: reconstructed (abstract and summaries; the soft form is ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import masked_mean, where_mask
from tokenloom.signals import attention_signal

PAPER = "arXiv:2605.07660"

Average = Literal["heads", "map"]
Subset = Literal["anchors", "explorers", "control"]


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Entropies behind a prompt of three tokens."""
    limit = (torch.arange(width, dtype=torch.float64) + 3).log().expand(rows, width)
    heads = torch.rand(rows, width, generator=generator, dtype=torch.float64) * limit
    rest = torch.rand(rows, width, generator=generator, dtype=torch.float64) * (limit - heads)
    return torch.stack([heads, heads + rest, limit], -1)


@attention_signal(
    "attention_entropy", "attention", "attention_entropies", "mask", "prompt_length", example=_example
)  # fmt: skip
def attention_entropy(attention: Tensor, attention_entropies: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    """[T, 3] nats: mean of the heads' entropies, entropy of the mean map, and ln n, what uniform attention has."""
    # Without a prompt the first token is predicted by nothing and cannot have been sampled.
    at = (torch.arange(len(mask), device=mask.device) + prompt_length - 1).clamp(min=0)
    of_map = torch.special.entr(attention[at]).sum(-1)
    return torch.stack([attention_entropies[at], of_map, (at + 1).to(of_map).log()], -1)


def token_entropies(
    attention_entropy: Tensor, mask: Tensor, average: Average = "heads", normalized: bool = False
) -> Tensor:
    """E of each token [B, T] from the signal [B, T, 3], zero off the mask; with `normalized` in [0, 1]."""
    x = where_mask(attention_entropy.detach(), mask[..., None])
    value, limit = x[..., 0 if average == "heads" else 1], x[..., 2]
    # A single visible token leaves nothing to spread over.
    return torch.where(limit > 0, value / limit, torch.zeros_like(value)) if normalized else value


@part("attention-entropy", stage="weight", scope="row", paper=PAPER)
def soft_weights(
    attention_entropy: Tensor, mask: Tensor,
    *, lam: float = 0.5, average: Average = "heads", normalized: bool = False,
) -> Tensor:  # fmt: skip
    """Weights [B, T] >= 0 with mean 1 in each row: tokens of low entropy above 1 for lam > 0, below for lam < 0."""
    entropies = token_entropies(attention_entropy, mask, average, normalized)
    number = mask.sum(-1, keepdim=True)
    filled = where_mask(entropies, mask, math.inf)
    ordered = filled.sort(-1).values
    below, through = (torch.searchsorted(ordered, filled, right=r) for r in (False, True))
    rank = (below + through - 1).to(entropies.dtype) / (2 * (number - 1).clamp(min=1))
    # A row's only token is neither anchor nor explorer.
    rank = torch.where(number > 1, rank, torch.full_like(rank, 0.5))
    weights = where_mask((1 + lam * (1 - 2 * rank)).clamp(min=0), mask)
    return where_mask(weights / masked_mean(weights, mask, -1)[:, None], mask)


@part("attention-entropy/subset", stage="weight", scope="row", paper=PAPER, properties={"draws"})
def subset(
    attention_entropy: Tensor, mask: Tensor, generator: torch.Generator,
    *, of: Subset = "anchors", fraction: float = 0.2, average: Average = "heads", normalized: bool = False,
) -> Tensor:  # fmt: skip
    """Weights [B, T]: 1 on floor(fraction * length) tokens of each row, at least one of two or more, else 0.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is the share of tokens that are trained on, in (0, 1]; got {fraction}")
    scores = token_entropies(attention_entropy, mask, average, normalized)
    if of == "control":
        scores = torch.zeros_like(scores)
        # Drawn for the mask alone, so that padding does not move the draws.
        scores[mask] = torch.rand(int(mask.sum()), generator=generator, dtype=scores.dtype, device=mask.device)
    length = mask.sum(-1, keepdim=True)
    number = torch.maximum((fraction * length.double() + 1e-6).floor(), (length > 1).double())
    order = where_mask(scores, mask, math.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=mask.device).expand_as(order)
    )
    # Explorers come from the end of the same order, so that ties never put a token into both.
    chosen = rank >= length - number if of == "explorers" else rank < number
    return (mask & chosen).to(scores.dtype)


@part("attention-entropy/metric", stage="metric", scope="batch", paper=PAPER)
def metric(attention_entropy: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Means over sampled tokens: `heads` and `map` in nats, `normalized`, the first as a share of ln n."""
    return {
        "heads": masked_mean(token_entropies(attention_entropy, mask), mask),
        "map": masked_mean(token_entropies(attention_entropy, mask, "map"), mask),
        "normalized": masked_mean(token_entropies(attention_entropy, mask, normalized=True), mask),
    }


class Geometry(NamedTuple):
    """A subset's gradient against the whole one: `cosine` of their angle and `norm_ratio`; 0 for a zero gradient."""

    cosine: float
    norm_ratio: float


def gradient_geometry(subset: Sequence[Tensor], whole: Sequence[Tensor]) -> Geometry:
    """Compare two gradients, each a tensor per parameter.

    Raises:
        ValueError: when the gradients are of different parameters.

    >>> gradient_geometry([torch.tensor([3.0, 0.0])], [torch.tensor([3.0, 4.0])])
    Geometry(cosine=0.6, norm_ratio=0.6)
    """
    if [x.shape for x in subset] != [x.shape for x in whole]:
        raise ValueError("the two gradients must have the same shapes, in the order of the same parameters")

    def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    own, other = math.sqrt(inner(subset, subset)), math.sqrt(inner(whole, whole))
    if not (own and other):
        return Geometry(0.0, 0.0)
    return Geometry(inner(subset, whole) / (own * other), own / other)


def direction_variance(gradients: Tensor) -> float:
    """Variance in [0, 1] of the directions of `gradients` [S, D] over S steps: 1 - |mean unit vector|^2.

    >>> direction_variance(torch.eye(2))
    0.5
    """
    units = torch.nn.functional.normalize(gradients.double(), dim=-1)
    return float(1 - (units.mean(0) ** 2).sum())


@preset("attention-entropy", paper=PAPER)
def attention_entropy_preset(
    *,
    train_on: Literal["all", "anchors", "explorers", "control"] = "all",
    lam: float = 0.5,
    fraction: float = 0.2,
    normalizer: Literal["selected", "all"] = "selected",
    average: Average = "heads",
    normalized: bool = False,
) -> Algorithm:
    """GRPO without KL and the token mean, with soft weights on all tokens (`lam`) or on a subset of them only."""
    of: dict[str, Any] = {"average": average, "normalized": normalized}
    count = "mask" if train_on == "all" or normalizer == "all" else "weights"
    weight = of | {"part": "attention-entropy", "lam": lam}
    if train_on != "all":
        weight = of | {"part": "attention-entropy/subset", "of": train_on, "fraction": fraction}
    return Algorithm.compose(
        advantage="grpo",
        weight=[weight],
        surrogate="ppo-clip",
        aggregate={"part": "token-mean", "count": count},
    )
