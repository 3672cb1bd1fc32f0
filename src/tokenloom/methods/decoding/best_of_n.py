"""Best-of-N: of N independent responses the one of the largest reward (arXiv 2009.01325; its law: arXiv 2401.01879).

choice      arg max_i r_i, the first among equals
law         P(y) = p(y) / P(class of y) (F(r_y)^N - F(r_y^-)^N),   F(r) = P(reward <= r), F(r^-) = P(reward < r);
            a class is what has one reward, so that p(y) / P(class) is 1 when rewards differ
divergence  KL(law || p) <= log N - (N - 1) / N, equal in the limit of a continuous reward

Shapes: N responses, M outcomes. Limits: N = 1 is plain sampling; N -> inf puts all on the best outcome. Deviations:
none. Fidelity: paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("best-of-n", stage="rank", scope="group", paper="arXiv:2009.01325")
def best_of_n(rewards: Sequence[float]) -> int:
    """Index of the first of the largest of `rewards` (N).

    Raises:
        ValueError: when there is none, or for one that is not a number.
    """
    if len(rewards) == 0 or any(math.isnan(r) for r in rewards):
        raise ValueError(f"the best of N needs the rewards of one response at least, all numbers; got {list(rewards)}")
    return max(range(len(rewards)), key=lambda i: rewards[i])


@part("best-of-n/law", stage="analysis", scope="row", paper="arXiv:2401.01879")
def best_of_n_law(probs: Tensor, rewards: Tensor, *, n: int = 16) -> Tensor:
    """The exact law [M] of the best of `n`, for outcomes of `probs` [M] (summing to 1) and `rewards` [M]; float64.

    Raises:
        ValueError: for n < 1.
    """
    if n < 1:
        raise ValueError(f"the best of n needs n >= 1, got {n}")
    probs = probs.double()
    ranks, which = torch.unique(rewards, return_inverse=True)
    masses = probs.new_zeros(len(ranks)).index_add(0, which, probs)
    upto = masses.cumsum(0)
    best = upto**n - (upto - masses) ** n
    return torch.where(probs > 0, probs / masses[which], 0.0) * best[which]


@part("best-of-n/kl-bound", stage="analysis", scope="row", paper="arXiv:2401.01879")
def kl_bound(*, n: int = 16) -> float:
    """The most that the best of `n` can diverge from plain sampling, in nats."""
    return math.log(n) - (n - 1) / n
