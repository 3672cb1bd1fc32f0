"""Context cutoff: chunks, labels, bounds, votes and thresholds by hand."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.context_cutoff import (
    chunk_ends,
    f1_score,
    outlier_bounds,
    soft_vote,
    sufficient,
    threshold_for,
)


def test_the_remainder_goes_to_the_first_chunks() -> None:
    ends = chunk_ends(23)
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert sizes == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert chunk_ends(3) == [1, 2, 3]
    assert chunk_ends(7, chunks=1) == [7]


@pytest.mark.parametrize("length", [1, 9, 10, 11, 99, 1000])
@pytest.mark.parametrize("chunks", [1, 2, 10])
def test_chunks_cover_the_context(length: int, chunks: int) -> None:
    ends = chunk_ends(length, chunks=chunks)
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == length
    assert len(ends) == min(chunks, length)
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_prefix_suffices_once_the_gold_span_is_in() -> None:
    assert sufficient(torch.tensor([3, 6, 9]), 6).tolist() == [False, True, True]


def test_f1_by_hand() -> None:
    predicted, labels = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert f1_score(predicted, labels) == 0.5
    assert f1_score(labels, labels) == 1
    assert f1_score(~labels, labels) == 0
    assert f1_score(~labels & labels, ~labels & labels) == 0


def test_bounds_by_hand() -> None:
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]], dtype=torch.float64)
    low, high = outlier_bounds(features)
    assert low.tolist() == [-2.0]
    assert high.tolist() == [6.0]


def test_votes_weigh_the_best_most() -> None:
    p = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    assert soft_vote(p).tolist() == pytest.approx([1.3 / 4.6, 0.5])
    assert soft_vote(p[:1]).tolist() == [1.0, 0.5]


def test_the_lowest_threshold_of_enough_precision() -> None:
    p = torch.tensor([0.9, 0.8, 0.7, 0.7, 0.6, 0.1])
    labels = torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    assert threshold_for(p, labels, precision=0.9) == pytest.approx(0.8)
    assert threshold_for(p, labels, precision=0.8) == pytest.approx(0.6)
    assert threshold_for(p, labels, precision=0.0) == pytest.approx(0.1)
    assert threshold_for(p, ~labels, precision=0.9) == pytest.approx(0.1)  # 2 of 6 is the best that there is


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="a context"):
        chunk_ends(0)
    with pytest.raises(ValueError, match="none is"):
        threshold_for(torch.ones(2), torch.zeros(2, dtype=torch.bool))
