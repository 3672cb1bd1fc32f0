"""Self-consistency: who wins a vote, and what ties, silence and weights do."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenloom.methods.decoding.self_consistency import majority, majority_of_top_m, weighted_majority

ANSWERS = [list(a) for a in itertools.product(["x", "y", None], repeat=4)]


def test_the_mode_wins_and_the_first_seen_of_equals() -> None:
    assert majority(["b", "a", "a", "c"]) == 1
    assert majority(["b", "a", "a", "b"]) == 0
    assert majority(["a"]) == 0


def test_no_answer_does_not_vote() -> None:
    assert majority([None, None, "a"]) == 2
    assert majority([None, None]) == 0
    assert weighted_majority([None, "a"], [9.0, 0.5]) == 1


def test_weights_are_added() -> None:
    assert weighted_majority(["a", "b", "b"], [0.5, 0.2, 0.2]) == 0
    assert weighted_majority(["a", "b", "b"], torch.tensor([0.5, 0.3, 0.3])) == 1
    # In another order, the same three weights: their sums must not differ by rounding.
    assert weighted_majority(["a", "b"] * 3, [0.1, 0.3, 0.2, 0.2, 0.3, 0.1]) == 0


@pytest.mark.parametrize("weight", [0.1, 1.0, 3.7])
def test_constant_weights_are_the_majority(weight: float) -> None:
    for answers in ANSWERS:
        assert weighted_majority(answers, [weight] * 4) == majority(answers)


def test_top_m_lies_between_the_best_and_the_majority() -> None:
    for answers in ANSWERS:
        scores = [0.3, 0.9, -1.0, 0.9]
        assert majority_of_top_m(answers, scores, m=4) == majority_of_top_m(answers, scores, m=99) == majority(answers)
        voting = [i for i, a in enumerate(answers) if a is not None]
        assert majority_of_top_m(answers, scores, m=1) == max(voting, key=lambda i: scores[i], default=0)
    assert majority_of_top_m(["a", "b", "a", "b", "b"], torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), m=3) == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        majority([])
    with pytest.raises(ValueError, match="exponential of log-probs"):
        weighted_majority(["a", "b"], [-0.5, -2.0])
    with pytest.raises(ValueError, match="2 weights"):
        weighted_majority(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="all of them numbers"):
        majority_of_top_m(["a"], [float("nan")])
    with pytest.raises(ValueError, match="m >= 1"):
        majority_of_top_m(["a"], [1.0], m=0)
