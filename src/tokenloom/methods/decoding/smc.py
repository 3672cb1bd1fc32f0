"""Sequential Monte Carlo: weighted strings of a law that only whole strings, or prefixes, can be asked about
(arXiv 2306.03081; the potentials as twists: arXiv 2404.17546; schemes of resampling: arXiv cs/0507025).

target       pi(x) = p(x) phi(x) / Z,   Z = sum_x p(x) phi(x);  p the model's law, phi(x) >= 0 what else is wanted
weight       w_t = w_{t-1}  p(x_t | x_<t) / q(x_t | x_<t)  phi(x_<=t) / phi(x_<t),   phi() = 1; q proposes
resample     when (sum w)^2 / sum w^2 < ess N: ancestors drawn so that particle i has N w_i / sum w children on average,
             and every child's weight is the mean of the old ones
estimate     Z^ = mean of the w of whole strings

It is properly weighted whatever phi > 0 of prefixes is: E[mean_i w_i 1{x_i = x}] = Z pi(x), so E[Z^] = Z. Those values
only steer. Shapes: N particles. Limits: ess = 0 is importance sampling; N = 1 draws from q. Deviations: none.
Fidelity: paper.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw

Scheme = Literal["systematic", "stratified", "multinomial"]
_PAPER = "arXiv:2306.03081"
_SCHEMES = "arXiv:cs/0507025"


@part("smc", stage="search", scope="group", paper=_PAPER)
def resampled(
    log_weights: Tensor, draw: Draw, *, ess: float = 0.5, resampling: Scheme = "systematic"
) -> tuple[list[int], Tensor] | None:
    """Ancestors of N particles of weights e^`log_weights` [N], and the children's log weights [N].

    None where the effective size is `ess` x N at least, or no weight is above 0: then everything stays as it is.
    """
    size = effective_size(log_weights)
    if size == 0 or size >= ess * len(log_weights):
        return None
    ancestors = {"systematic": systematic, "stratified": stratified, "multinomial": multinomial}[resampling]
    return ancestors(log_weights, draw), torch.full_like(log_weights, log_mean_exp(log_weights))


@part("smc/multinomial", stage="search", scope="group", paper=_SCHEMES)
def multinomial(log_weights: Tensor, draw: Draw) -> list[int]:
    """N ancestors of N particles, each drawn by the weights e^`log_weights` [N]."""
    weights = _normalized(log_weights)
    return [draw.categorical(weights) for _ in range(len(weights))]


@part("smc/stratified", stage="search", scope="group", paper=_SCHEMES)
def stratified(log_weights: Tensor, draw: Draw) -> list[int]:
    """N ancestors at the points (k + u_k) / N of the cumulative weights, one u for each k.

    What is drawn for k is the particle itself, by its share of the k-th N-th of the cumulative weights.
    """
    weights = _normalized(log_weights)
    n = len(weights)
    ends = weights.cumsum(0) * n
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    shares = [(ends.clamp(max=k + 1.0) - starts.clamp(min=float(k))).clamp(min=0) for k in range(n)]
    return [draw.categorical(share) for share in shares]


@part("smc/systematic", stage="search", scope="group", paper=_SCHEMES)
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


@part("smc/ess", stage="analysis", scope="group", paper=_PAPER)
def effective_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of the weights e^`log_weights` [N], between 1 and N; 0 when all are 0."""
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
