"""Top-p."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept, random_scores
from tokenloom.methods.decoding.top_p import top_p


def test_worked_numbers() -> None:
    assert kept(top_p(P, p=0.8)) == [0, 1, 2]
    assert kept(top_p(P, p=0.5 - 1e-9)) == [0]
    assert kept(top_p(P, p=0.5 + 1e-9)) == [0, 1]
    assert kept(top_p(P.flip(-1), p=0.8)) == [2, 3, 4]


def test_equal_tokens_stand_in_the_order_of_their_ids() -> None:
    assert kept(top_p(torch.full((1, 4), 0.25, dtype=torch.float64), p=0.4)) == [0, 1]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_transformers_keeps_the_same(p: float) -> None:
    agree(lambda probs: top_p(probs, p=p), TopPLogitsWarper(p))


def test_all_of_the_mass_is_every_possible_token() -> None:
    for dtype in (torch.float64, torch.float32):
        probs = random_scores().softmax(-1).to(dtype)
        assert torch.equal(top_p(probs, p=1.0), probs > 0)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="share of the mass"):
        top_p(P, p=p)
