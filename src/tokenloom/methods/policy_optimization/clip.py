"""Constant limits of the importance ratio (PPO, arXiv 1707.06347; asymmetric as in DAPO, arXiv 2503.14476).

lo = 1 - low, hi = 1 + high, cap limits the ratio of negative advantages (dual clip); None means no limit.
`caps` states absolute limits instead: "high = 5" is a ratio of 5 there and of 6 here, the difference
between TRL's and verl's reading of CISPO. Fidelity: code.
"""

from __future__ import annotations

from tokenloom.catalog import part

INFINITY = float("inf")


@part("clip", stage="bounds", scope="token", paper="arXiv:1707.06347")
def clip(*, low: float = 0.2, high: float = 0.2, cap: float | None = None) -> tuple[float, float, float]:
    """Limits (lo, hi, cap) of the ratio as distances from 1.

    Raises:
        ValueError: for negative distances, or a cap that is not above 1.

    >>> clip(low=0.2, high=0.28)
    (0.8, 1.28, inf)
    """
    if low < 0 or high < 0:
        raise ValueError(f"clip distances must be >= 0, got low={low}, high={high}")
    if cap is not None and cap <= 1:
        raise ValueError(f"cap limits the ratio of negative advantages and must exceed 1, got {cap}")
    return 1 - low, 1 + high, INFINITY if cap is None else cap


@part("clip/caps", stage="bounds", scope="token", paper="arXiv:2506.13585")
def caps(*, lo: float | None = None, hi: float | None = 5.0) -> tuple[float, float, float]:
    """Absolute limits (lo, hi, cap=inf) of the ratio.

    >>> caps(hi=5.0)
    (0.0, 5.0, inf)
    """
    return 0.0 if lo is None else lo, INFINITY if hi is None else hi, INFINITY
