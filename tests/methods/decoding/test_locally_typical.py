"""Locally typical sampling."""

from __future__ import annotations

import pytest
import torch
from transformers import TypicalLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept, random_scores
from tokenloom.methods.decoding.locally_typical import locally_typical


def test_worked_numbers() -> None:
    # Shifts .639927, .276364, .564046, .969511, 1.662658: order 1, 2, 0, 3, 4, cumulative .2, .35, .85, .95, 1.
    assert kept(locally_typical(P, mass=0.5)) == [0, 1, 2]
    assert kept(locally_typical(P, mass=0.9)) == [0, 1, 2, 3]
    assert kept(locally_typical(P, mass=0.1)) == [1]
    assert kept(locally_typical(P, mass=0.3)) == [1, 2]
    assert kept(locally_typical(P, mass=1.0)) == [0, 1, 2, 3, 4]


def test_uniform_laws_are_kept_whole() -> None:
    assert bool(locally_typical(torch.full((2, 7), 1 / 7), mass=0.1).all())


@pytest.mark.parametrize("mass", [0.1, 0.2, 0.5, 0.95])
def test_transformers_keeps_the_same(mass: float) -> None:
    agree(lambda p: locally_typical(p, mass=mass), TypicalLogitsWarper(mass))


def test_all_of_the_mass_is_every_possible_token() -> None:
    for dtype in (torch.float64, torch.float32):
        probs = random_scores().softmax(-1).to(dtype)
        assert torch.equal(locally_typical(probs, mass=1.0), probs > 0)


@pytest.mark.parametrize("mass", [0.0, 1.1, float("nan")])
def test_what_is_no_share_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="share of the probability"):
        locally_typical(P, mass=mass)
