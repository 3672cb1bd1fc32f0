"""Medians, spreads (smallest to largest) and ratios of alternating measurements.

With five rounds quartiles would hide two of the values; smallest and largest hide none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest.

    Raises:
        ValueError: for no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"a spread needs finite values, got {list(values)!r}")
    return Spread(statistics.median(values), min(values), max(values))


def advantage(ours: Mapping[int, float], peer: Mapping[int, float], *, lower_is_better: bool) -> Spread:
    """How many times better ours is: the ratio of medians, and the extremes of the ratios round by round.

    Both map rounds to values. Above 1 ours is better, whichever way the values point.

    Raises:
        ValueError: when no round has both.
    """
    both = sorted(ours.keys() & peer.keys())
    if not both:
        raise ValueError("no round has a measurement of both sides")
    pairs = [(peer[r], ours[r]) if lower_is_better else (ours[r], peer[r]) for r in both]
    over, under = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return Spread(over / under, min(ratios), max(ratios))
