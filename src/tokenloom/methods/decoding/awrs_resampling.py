"""Resampling for AWRS: N weighted particles become N of equal weight (arXiv 2504.05410).

Ancestors are drawn so that particle i has N w_i children on average, w the normalized weights; each child's weight is
the mean of the old ones, so that the mean of the weights stays an unbiased estimate of the normalizing constant. It is
time when the effective size (Σ w)² / Σ w² falls below a share of N.
Deviations: none. Fidelity: code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw

_PAPER = "arXiv:2504.05410"


@part("awrs/multinomial", stage="search", scope="group", paper=_PAPER)
def multinomial(log_weights: Tensor, draw: Draw) -> list[int]:
    """N ancestors of N particles, each drawn by the weights e^`log_weights` [N]."""
    weights = _normalized(log_weights)
    return [draw.categorical(weights) for _ in range(len(weights))]


@part("awrs/systematic", stage="search", scope="group", paper=_PAPER)
def systematic(log_weights: Tensor, draw: Draw) -> list[int]:
    """N ancestors at the points (k + u) / N of the cumulative weights, one u for all.

    Particle i gets floor(N w_i) or ceil(N w_i) children. The result changes with u at finitely many points only, so u's
    interval between two of them is drawn.
    """
    weights = _normalized(log_weights)
    n = len(weights)
    cumulative = weights.cumsum(0)
    changes = torch.unique(torch.cat((torch.zeros(1, dtype=torch.float64), (cumulative * n) % 1.0)))
    ends = torch.cat((changes, torch.ones(1, dtype=torch.float64)))
    at = draw.categorical(ends.diff().clamp(min=0))
    u = (ends[at] + ends[at + 1]) / 2
    points = (torch.arange(n, dtype=torch.float64) + u) / n
    found = torch.searchsorted(cumulative, points, right=True)
    return [int(i) for i in found.clamp(max=int(weights.nonzero()[-1]))]


@part("awrs/ess", stage="analysis", scope="group", paper=_PAPER)
def effective_size(log_weights: Tensor) -> float:
    """(Σ w)² / Σ w² of the weights e^`log_weights` [N], between 1 and N; 0 when all are 0."""
    if not bool((log_weights > -torch.inf).any()):
        return 0.0
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def log_mean_exp(log_weights: Tensor) -> float:
    """log of the mean of e^`log_weights` [N]: with proper weights, an estimate whose exponential is unbiased."""
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


def _normalized(log_weights: Tensor) -> Tensor:
    if not bool((log_weights > -torch.inf).any()):
        raise ValueError("every particle has weight 0: there is nothing to resample from")
    return log_weights.double().softmax(0)
