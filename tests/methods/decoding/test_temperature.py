"""Temperature."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper

from tests.methods.decoding.truncation import P, random_scores
from tokenloom.decode import shaper
from tokenloom.methods.decoding.temperature import temperature


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_the_law_is_raised_to_the_power_of_one_over_tau(tau: float) -> None:
    expected = P ** (1 / tau) / (P ** (1 / tau)).sum()
    torch.testing.assert_close(temperature(P.log(), temperature=tau).softmax(-1), expected, rtol=1e-12, atol=0)
    scores = random_scores()
    theirs = TemperatureLogitsWarper(tau)(torch.zeros(64, 1, dtype=torch.int64), scores)
    assert torch.equal(temperature(scores, temperature=tau), theirs)


def test_towards_zero_it_is_greedy_and_zero_is_refused() -> None:
    assert temperature(P.log(), temperature=1e-3).softmax(-1)[0, 0] == 1.0
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="do_sample=False"):
            temperature(P.log(), temperature=tau)


def test_no_temperature_makes_impossible_tokens_possible() -> None:
    scores = torch.tensor([[1.0, -torch.inf, -1.0]])
    assert temperature(scores, temperature=1e6).softmax(-1)[0].tolist() == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)
    with pytest.raises(ValueError, match="must be finite"):
        temperature(scores, temperature=float("inf"))


def test_by_name() -> None:
    assert torch.equal(shaper("temperature", temperature=2.0)(torch.zeros(1, 1), P), P / 2)
