"""CNTP's rules: how many trials, and which one stays."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.cntp import most_confident, trials


def test_worked_numbers_of_trials() -> None:
    assert trials(torch.tensor([0.0, 0.01, 0.75, 1.5, 3.0])).tolist() == [1, 1, 5, 10, 10]
    assert trials(torch.tensor([0.0, 0.75, 1.5]), n_min=2, n_max=40).tolist() == [2, 20, 40]


def test_limits() -> None:
    entropies = torch.tensor([0.0, 0.5, 9.0])
    assert trials(entropies, h_lo=math.inf).tolist() == [1, 1, 1]
    assert trials(entropies, h_lo=0.5, h_hi=0.5).tolist() == [1, 10, 10]
    assert trials(entropies, n_min=3, n_max=3).tolist() == [3, 3, 3]
    assert trials(entropies, h_hi=math.inf).tolist() == [1, 1, 1]


def test_the_largest_mean_of_own_tokens_wins() -> None:
    assert most_confident([[-1.0, -1.0], [-0.5], [-0.2, -0.6, -0.7], [-0.5, -0.5]]) == 1
    assert most_confident([[-9.0]]) == 0


def test_mistakes_are_named() -> None:
    for settings in ({"n_min": 0}, {"n_min": 3, "n_max": 2}):
        with pytest.raises(ValueError, match="n_min <= n_max"):
            trials(torch.zeros(1), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exchange them"):
        trials(torch.zeros(1), h_lo=2.0, h_hi=1.0)
    for empty in ([], [[-1.0], []]):
        with pytest.raises(ValueError, match="at least one token"):
            most_confident(empty)
