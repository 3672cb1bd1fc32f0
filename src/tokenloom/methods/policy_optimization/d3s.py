"""D3S: train on the responses with the widest spread of advantages and on their tokens with the largest |A| H
(arXiv 2509.22115).

1. Of all rows keep the `fraction` whose advantages have the largest variance, across groups or (D3S-I) inside each.
   The maximizer is the k smallest and the N - k largest for some k, so sorting and N + 1 prefix sums find it.
2. Of their tokens keep the `fraction` with the largest |A_t| H_t, H in nats; the others get weight 0 and
   leave the normalizer.                                                                             [B, T]
3. Both fractions grow linearly: few rows and tokens first, more later.
Advantages come from the full batch and stay as they are: the spread is the point. Rows at A = 0 go first when
advantages sum to 0, as group-centered ones do. Equal advantages keep the first rows, equal scores the first tokens.
Limit: both fractions 1 are the base algorithm with the token mean. Deviations: the end points of the schedules are
not in the source at hand; these use about 16 % of the tokens, where the paper reports under 20 %.
Fidelity: reconstructed.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import masked_mean

_PAPER = "arXiv:2509.22115"


@part("d3s", stage="select", scope="batch", paper=_PAPER, properties={"order-dependent"})
def d3s(
    advantages: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    fraction: float = 0.5,
    within: Literal["batch", "group"] = "batch",
) -> Tensor:
    """Rows [B] bool of the widest subset; a row without sampled tokens is no candidate, unless all are kept.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    check_fraction("d3s", fraction)
    if fraction == 1:
        return torch.ones_like(group_ids, dtype=torch.bool)
    row, keep = masked_mean(advantages, mask, -1), torch.zeros_like(group_ids, dtype=torch.bool)
    pools = [torch.ones_like(keep)] if within == "batch" else [group_ids == g for g in torch.unique(group_ids)]
    for pool in pools:
        rows = (pool & mask.any(-1)).nonzero().reshape(-1)
        keep[rows[widest_subset(row[rows], share_of(fraction, len(rows)))]] = True
    return keep


@part("d3s/tokens", stage="weight", scope="batch", paper=_PAPER, properties={"order-dependent"})
def d3s_tokens(advantages: Tensor, entropies: Tensor, mask: Tensor, *, fraction: float = 0.5) -> Tensor:
    """Weights [B, T] of 0 and 1; exactly ceil(fraction * sampled tokens) of them are 1.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    check_fraction("d3s/tokens", fraction)
    score = (advantages.abs() * entropies.detach())[mask]
    order = score.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(score)
    chosen[order[: share_of(fraction, len(score))]] = 1
    return torch.zeros_like(advantages).masked_scatter(mask, chosen)


def widest_subset(values: Tensor, size: int) -> Tensor:
    """bool [n]: the `size` of `values` [n] with the largest variance; the first ones when all are equal.

    >>> widest_subset(torch.tensor([0.1, -1.0, 0.0, 2.0]), 2)
    tensor([False,  True, False,  True])
    """
    number = len(values)
    keep = torch.zeros_like(values, dtype=torch.bool)
    if size >= number:
        return torch.ones_like(keep)
    if bool((values == values[0]).all()):
        keep[:size] = True
        return keep
    order = values.argsort(stable=True)
    x = (values - values.mean()).double()[order]
    sums, squares = (torch.cat([x.new_zeros(1), y.cumsum(0)]) for y in (x, x**2))
    # From many small values to few, so that of equally wide subsets the one with the first rows is taken.
    low = torch.arange(size, -1, -1, device=values.device)
    cut = number - size + low
    total, square = (s[low] + s[number] - s[cut] for s in (sums, squares))
    best = size - int((square / size - (total / size) ** 2).argmax())
    keep[torch.cat([order[:best], order[number - size + best :]])] = True
    return keep


def share_of(fraction: float, number: int) -> int:
    """ceil(fraction * number), unharmed by rounding: 0.07 of 100 is 7."""
    return min(number, math.ceil(fraction * number - 1e-6))


def check_fraction(owner: str, fraction: float) -> None:
    """Refuse what is no fraction.

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{owner}: fraction is what is trained on, in (0, 1]; got {fraction}")


@preset("d3s", paper=_PAPER)
def d3s_preset(
    *,
    base: Literal["grpo", "gspo"] = "grpo",
    within: Literal["batch", "group"] = "batch",
    rows: float = 0.25,
    rows_end: float = 0.5,
    tokens: float = 0.2,
    tokens_end: float = 0.6,
    steps: int | None = 100,
) -> Algorithm:
    """Down-sampling on GRPO or GSPO, relaxed over `steps` (None: the whole run), token mean of the kept tokens."""

    def growing(start: float, end: float) -> dict[str, Any]:
        return {"schedule": "linear", "start": start, "end": end} | ({} if steps is None else {"steps": steps})

    plain = Algorithm.from_recipe({"preset": base} | ({"kl_coef": 0.0} if base == "grpo" else {}))
    return plain.override(
        select=[{"part": "d3s", "fraction": growing(rows, rows_end), "within": within}],
        weight=[{"part": "d3s/tokens", "fraction": growing(tokens, tokens_end)}],
        aggregate={"part": "token-mean", "count": "weights"},
    )
