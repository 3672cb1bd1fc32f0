"""Top-k."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept, random_scores
from tokenloom.methods.decoding.top_k import top_k


def test_worked_numbers() -> None:
    assert kept(top_k(P, k=1)) == [0]
    assert kept(top_k(P, k=3)) == [0, 1, 2]
    assert kept(top_k(P, k=9)) == [0, 1, 2, 3, 4]


def test_ties_at_the_threshold_stay() -> None:
    assert kept(top_k(torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.2]]), k=4)) == [0, 1, 2, 3, 4]
    assert kept(top_k(torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.2]]), k=1)) == [1, 3]


@pytest.mark.parametrize("k", [1, 7, 50])
def test_transformers_keeps_the_same(k: int) -> None:
    agree(lambda p: top_k(p, k=k), TopKLogitsWarper(k))


def test_impossible_tokens_are_never_kept() -> None:
    probs = random_scores().softmax(-1)
    found = top_k(probs, k=190)
    assert torch.equal(found[::5], probs[::5] > 0)


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        top_k(P, k=0)
