"""CARDS' rules: the rising threshold and the acceptance."""

from __future__ import annotations

import math

import pytest

from tokenloom.methods.decoding.cards import acceptance, reward_threshold


def test_worked_numbers() -> None:
    assert reward_threshold(2.0, 0, 128) == 5.25
    assert reward_threshold(2.0, 64, 128) == 6.875
    assert reward_threshold(2.0, 128, 128) == 8.5
    assert acceptance(5.5, 6.875) == pytest.approx(0.140256, abs=1e-6)


def test_the_threshold_never_passes_the_target() -> None:
    # A prompt that earns more than the target already: the way to it falls, and the bound is the target.
    assert reward_threshold(12.0, 0, 10, target=8.0) == 8.0
    assert reward_threshold(2.0, 5, 10, alpha=1.0) == 8.5
    assert reward_threshold(2.0, 0, 10, alpha=0.0) == 2.0


def test_soft_and_hard() -> None:
    assert acceptance(7.0, 6.875) == acceptance(6.875, 6.875) == 1.0
    assert acceptance(6.0, 6.875, accept="hard") == 0.0
    assert acceptance(6.875, 6.875, accept="hard") == 1.0
    assert acceptance(-math.inf, 0.0) == 0.0
    assert acceptance(0.0, 100.0, beta=1e12) == pytest.approx(1.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="accept='hard'"):
        acceptance(0.0, 0.0, beta=0.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        reward_threshold(0.0, 0, 1, alpha=1.5)
