"""Meta-generation: minimum Bayes risk and its limit, curves of accuracy over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenloom.methods.decoding.meta_generation import compute_curve, exact_match, minimum_bayes_risk
from tokenloom.methods.decoding.self_consistency import majority


def test_exact_match_is_the_majority_vote() -> None:
    for n in range(1, 6):
        for answers in itertools.product(["x", "y", "z", None], repeat=n):
            assert minimum_bayes_risk(exact_match(answers)) == majority(answers)


def test_the_largest_mean_utility_wins() -> None:
    utility = torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.9], [0.2, 0.9, 1.0]])
    assert minimum_bayes_risk(utility) == 2
    assert minimum_bayes_risk(torch.ones(3, 3)) == 0
    # Rows are candidates, columns truths.
    assert minimum_bayes_risk(torch.tensor([[0.0, 0.0], [1.0, 0.0]])) == 1


def test_curve_by_hand() -> None:
    answers = [["a", "b", "b"], ["c", "c", None]]
    curve = compute_curve(answers, ["b", "c"], [[10, 20, 30], [1, 1, 1]])
    assert curve == [(5.5, 0.5), (16.0, 0.5), (31.5, 1.0)]
    assert compute_curve([[None]], [None], [[4]]) == [(4.0, 0.0)]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[N, N\]"):
        minimum_bayes_risk(torch.ones(2, 3))
    with pytest.raises(ValueError, match="numbers"):
        minimum_bayes_risk(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="same number of candidates"):
        compute_curve([["a"], ["a", "b"]], ["a", "a"], [[1], [1, 2]])
