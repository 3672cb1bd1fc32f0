"""Eta sampling."""

from __future__ import annotations

import pytest
import torch
from transformers import EtaLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept, random_scores
from tokenloom.methods.decoding.epsilon_sampling import epsilon_sampling
from tokenloom.methods.decoding.eta_sampling import eta_sampling, eta_threshold


def test_worked_numbers() -> None:
    assert float(eta_threshold(P, 0.2)) == pytest.approx(0.117915, abs=1e-6)
    assert kept(eta_sampling(P, epsilon=0.2)) == [0, 1, 2]


def test_where_the_law_is_certain_it_is_epsilon_sampling() -> None:
    probs = torch.tensor([[0.97, 0.02, 0.01]], dtype=torch.float64)
    assert float(eta_threshold(probs, 0.015)) == 0.015
    assert torch.equal(eta_sampling(probs, epsilon=0.015), epsilon_sampling(probs, epsilon=0.015))


@pytest.mark.parametrize("epsilon", [3e-4, 0.01, 0.2])
def test_transformers_keeps_the_same(epsilon: float) -> None:
    # Their threshold is a float32 tensor: rows in float32.
    scores = random_scores().float()
    agree(lambda p: eta_sampling(p, epsilon=epsilon), EtaLogitsWarper(epsilon), scores)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, float("nan")])
def test_what_is_no_probability_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="probability in"):
        eta_sampling(P, epsilon=epsilon)
