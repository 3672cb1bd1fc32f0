"""Epsilon sampling."""

from __future__ import annotations

import pytest
import torch
from transformers import EpsilonLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept
from tokenloom.methods.decoding.epsilon_sampling import epsilon_sampling


def test_worked_numbers() -> None:
    assert kept(epsilon_sampling(P, epsilon=0.15)) == [0, 1, 2]
    assert kept(epsilon_sampling(P, epsilon=0.16)) == [0, 1]
    assert kept(epsilon_sampling(P, epsilon=0.9)) == [0]


def test_the_most_probable_always_stay() -> None:
    assert kept(epsilon_sampling(torch.full((1, 4), 0.25), epsilon=0.5)) == [0, 1, 2, 3]


@pytest.mark.parametrize("epsilon", [3e-4, 0.01, 0.2])
def test_transformers_keeps_the_same(epsilon: float) -> None:
    agree(lambda p: epsilon_sampling(p, epsilon=epsilon), EpsilonLogitsWarper(epsilon))


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -1.0, float("nan")])
def test_what_is_no_probability_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="probability in"):
        epsilon_sampling(P, epsilon=epsilon)
