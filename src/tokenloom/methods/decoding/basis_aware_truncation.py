"""BAT: drop a token only where the softmax bottleneck cannot have hidden a zero (arXiv 2310.01693).

A model whose scores are W h + b sees the true law p* only through W' p*, the expected row of W. A token of probability
at or above a threshold t is kept. One below is kept if it must have mass in every p* that the model's p may stand for,
that is, if no p* has
W' p* = W' p,   sum p* = 1,   p*_v = 0,   0 <= p* <= p / (1 - t).
That is one linear program per token below t. `basis` holds W's c main directions, as more constraints only cost time;
`groups` fuses tokens of one label into one unknown, all but the half of the unknowns that lie nearest to the token in
question. Fused masses move together, which leaves fewer solutions, so more tokens are kept, and saves most of the time.
Sampling draws tokens without replacement until one is kept (so the law is p on all that would be kept), and takes the
most probable token after `most` rejections.
Limits: a basis of rank V keeps every token with mass; without a basis, c = 0, only tokens at or above t are kept.
Deviations: p* >= 0 is asked for, as in the paper; nonneg=False leaves it out, as the released sampler does, whose
programs have more solutions and keep fewer tokens. 1 / (1 - t) is capped at 1e10, as released. Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.eta_sampling import eta_threshold
from tokenloom.methods.decoding.top_p import top_p

_MOST_SLACK = 1e10


@dataclass(frozen=True)
class Program:
    """Is there an x [n] with `lower` <= x <= `upper` and `matrix` [c, n] x = `target` [c]? In float64.

    x_j is the share of its mass, or of its group's, that an unknown keeps.
    """

    matrix: Tensor
    target: Tensor
    lower: float
    upper: float


Feasible = Callable[[Program], bool]
"""Solves a program; False where there is no such x, or the solver fails."""


@part("basis-aware-truncation", stage="choose", scope="row", paper="arXiv:2310.01693")
def basis_aware_truncation(
    probs: Tensor,
    basis: Tensor,
    feasible: Feasible,
    draw: Draw,
    groups: Tensor | None = None,
    *,
    base: Literal["eta", "epsilon", "top-p"] = "eta",
    epsilon: float = 1e-3,
    p: float = 0.95,
    most: int = 10,
    nonneg: bool = True,
) -> int:
    """A token drawn from probs [V] with a basis [V, c] and, if tokens are to be fused, labels `groups` [V].

    The threshold comes from eta or epsilon sampling with `epsilon`, or is the smallest probability that top-p with `p`
    keeps.

    Raises:
        ValueError: for `most` below 1, or a parameter that the base rule refuses.
    """
    if most < 1:
        raise ValueError(f"basis-aware-truncation: draws at least one token before it gives up, got most = {most}")
    probs = probs.double()
    threshold = base_threshold(probs, base=base, epsilon=epsilon, p=p)
    left = probs.clone()
    for _ in range(most):
        token = draw.categorical(left)
        if must_have_mass(probs, basis, threshold, token, feasible, groups, nonneg=nonneg):
            return token
        left[token] = 0.0
    return int(probs.argmax())


def base_threshold(
    probs: Tensor, *, base: Literal["eta", "epsilon", "top-p"], epsilon: float = 1e-3, p: float = 0.95
) -> float:
    """t of probs [V], never above the largest of them, so that a token is always left.

    Raises:
        ValueError: for an epsilon outside (0, 1) or a p outside (0, 1].
    """
    if base == "top-p":
        return float(probs[top_p(probs[None], p=p)[0]].min())
    threshold = float(eta_threshold(probs[None], epsilon)) if base == "eta" else epsilon
    return min(threshold, float(probs.max()))


def must_have_mass(
    probs: Tensor,
    basis: Tensor,
    threshold: float,
    token: int,
    feasible: Feasible,
    groups: Tensor | None = None,
    *,
    nonneg: bool = True,
) -> bool:
    """Whether `token` is kept: probs [V] (float64) at or above the threshold, or no law p* without it."""
    if float(probs[token]) >= threshold:
        return True
    return not feasible(program(probs, basis, threshold, token, groups, nonneg=nonneg))


def program(
    probs: Tensor, basis: Tensor, threshold: float, token: int, groups: Tensor | None = None, *, nonneg: bool = True
) -> Program:
    """What a law without `token` would have to fulfill."""
    slack = min(1 / (1 - threshold), _MOST_SLACK) if threshold < 1 else _MOST_SLACK
    # Each token's mass and what it adds to the expected row.
    columns = torch.cat((basis.to(probs), torch.ones_like(probs)[:, None]), -1) * probs[:, None]
    others = torch.ones_like(probs, dtype=torch.bool)
    others[token] = False
    matrix = columns[others] if groups is None else _fused(columns, basis, token, groups, others)
    return Program(matrix.T, columns.sum(0), 0.0 if nonneg else -torch.inf, slack)


def _fused(columns: Tensor, basis: Tensor, token: int, groups: Tensor, others: Tensor) -> Tensor:
    count = int(groups.max()) + 1
    near = (basis @ basis[token]).masked_fill(~others, -torch.inf).topk(min(count, len(basis) - 1)).indices
    rest = others.index_fill(0, near, False)
    sums = columns.new_zeros(count, columns.shape[1]).index_add(0, groups[rest], columns[rest])
    return torch.cat((columns[near], sums))
