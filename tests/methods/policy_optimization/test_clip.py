"""Constant bounds."""

from __future__ import annotations

import pytest

from methods.policy_optimization.batch import INF, close, coefficients_of, defaults, make, rollouts_of, signals_of
from tokenloom.methods.policy_optimization.clip import caps, clip


def test_defaults() -> None:
    assert defaults("clip") == {"low": 0.2, "high": 0.2, "cap": None}
    assert defaults("clip/caps") == {"lo": None, "hi": 5.0}


def test_distances_and_absolute_limits() -> None:
    assert clip() == (0.8, 1.2, INF)
    assert clip(low=0.2, high=0.28, cap=3.0) == (0.8, 1.28, 3.0)
    assert clip(high=5.0)[1] == 6.0
    assert caps(hi=5.0) == (0.0, 5.0, INF)
    assert caps(lo=0.5, hi=None) == (0.5, INF, INF)


@pytest.mark.parametrize(
    ("wrong", "named"), [({"low": -0.1}, "low=-0.1"), ({"high": -1.0}, "high=-1.0"), ({"cap": 1.0}, "got 1.0")]
)
def test_impossible_limits_are_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        clip(**wrong)


def test_bounds_reach_the_surrogate() -> None:
    rollouts = rollouts_of([1.0, 0.0])
    signals = signals_of(rollouts, [[0.2623643], [0.0]])  # ratio 1.3
    plain = make("grpo", dialect="prime-rl")
    assert coefficients_of(plain, rollouts, signals)[0].item() == 0
    wider = plain.override(bounds={"high": 0.31})
    close(coefficients_of(wider, rollouts, signals)[0], 0.5 * 1.3 / 2, 1e-6)
