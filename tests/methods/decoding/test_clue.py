"""CLUE: the worked example, and what may not change a verdict."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.clue import centroids, closeness, clue, distance
from tokenloom.methods.decoding.self_consistency import majority, majority_of_top_m

POSITIVE = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def test_worked_numbers() -> None:
    delta = torch.tensor([[[0.5, 0.0], [0.0, -0.2]]], dtype=torch.float64)
    assert distance(delta, POSITIVE).tolist() == pytest.approx([0.85], abs=1e-12)
    assert distance(delta, -POSITIVE).tolist() == pytest.approx([1.15], abs=1e-12)
    assert clue(delta, POSITIVE, -POSITIVE).tolist() == pytest.approx([0.3], abs=1e-12)
    assert closeness(delta, POSITIVE).tolist() == pytest.approx([-0.85], abs=1e-12)


def test_centroids_are_the_means_of_the_classes() -> None:
    deltas = torch.arange(16, dtype=torch.float64).view(4, 2, 2)
    positive, negative = centroids(deltas, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(positive, torch.tensor([[4.0, 5.0], [6.0, 7.0]], dtype=torch.float64))
    torch.testing.assert_close(negative, torch.tensor([[8.0, 9.0], [10.0, 11.0]], dtype=torch.float64))


def test_a_constant_added_to_all_hidden_states_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    start, end = (torch.randn(9, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    shift = torch.randn(3, 5, generator=g, dtype=torch.float64)
    labels = torch.arange(9) % 2 == 0

    def scores(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        deltas = end - start
        return clue(deltas, *centroids(deltas, labels))

    torch.testing.assert_close(scores(start, end), scores(start + shift, end + shift), rtol=0, atol=1e-12)


def test_ranking_spans_from_the_nearest_to_the_vote() -> None:
    deltas = POSITIVE * torch.tensor([0.0, 0.9, -1.0, 0.5])[:, None, None]
    answers = ["a", "b", "a", "a"]
    scores = closeness(deltas, POSITIVE)
    assert majority_of_top_m(answers, scores, m=1) == 1
    assert majority_of_top_m(answers, scores, m=4) == majority(answers) == 0


def test_half_precision_is_summed_in_float32() -> None:
    deltas = torch.ones(4000, 1, 1, dtype=torch.float16)
    positive, _ = centroids(torch.cat((deltas, deltas[:1])), torch.arange(4001) < 4000)
    assert positive.dtype == torch.float32
    assert float(positive) == 1.0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="4 correct of 4"):
        centroids(torch.ones(4, 1, 1), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="belong to the model"):
        clue(torch.ones(1, 3, 2), POSITIVE, POSITIVE)
