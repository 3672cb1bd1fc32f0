"""Estimates with intervals: the jackknife over batches, Student's t over seeds.

Delete-one jackknife: with x_(i) the statistic without batch i and m batches, the standard error is
sqrt((m - 1)/m sum (x_(i) - mean x_(.))^2). Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

_Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and the half-width of its 95 % interval; NaN where nothing can be said."""

    value: float
    half: float


def finite(value: float) -> float | None:
    """The number, None if it is not finite."""
    return value if math.isfinite(value) else None


def jackknife(statistic: Callable[[Tensor], Tensor], batches: int) -> Estimate:
    """`statistic` maps weights [K, m] (rows sum to 1) to [K] values; its interval over `batches` equal batches."""
    whole = torch.full((1, batches), 1 / batches, dtype=torch.float64)
    without = (1 - torch.eye(batches, dtype=torch.float64)) / (batches - 1)
    value, left_out = float(statistic(whole)[0]), statistic(without)
    error = ((batches - 1) / batches * ((left_out - left_out.mean()) ** 2).sum()).sqrt()
    return Estimate(value, t_quantile(batches - 1) * float(error))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds and Student's t interval, none for a single seed. One seed without a value leaves no mean."""
    if not all(math.isfinite(v) for v in values):
        return Estimate(math.nan, math.nan)
    if len(values) == 1:
        return Estimate(values[0], math.nan)
    return Estimate(fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else by its expansion around the
    normal quantile, which is below by at most 0.7 % (at 3).
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom) ** (k + 1) for k, term in enumerate(terms))
