"""GRAD: edges of a text, and their fusion with scores."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoding.truncation import random_scores
from tokenloom.methods.decoding.grad import grad, transition_edges

Z = torch.tensor([[2.0, 0.0, 1.0, -2.0]], dtype=torch.float64)
G = torch.tensor([[0.0, 4.0, 0.0, 2.0]], dtype=torch.float64)


def test_worked_numbers() -> None:
    # Range -2..2; evidence 1 and 1/2 become 2 and 0; lambda = .5.
    found = grad(Z, G, lambda_max=0.5, adaptive=False)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 1.0, -1.0]], dtype=torch.float64))
    # Without the range: 2 and 1.
    found = grad(Z, G, lambda_max=0.5, adaptive=False, scale="max")
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 1.0, -0.5]], dtype=torch.float64))
    share = 0.5 * (1 - float(Z.softmax(-1).max()))
    assert float(grad(Z, G)[0, 1]) == pytest.approx(share * 2.0)


def test_without_edges_or_share_nothing_changes() -> None:
    scores = random_scores()
    edges = torch.rand(64, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grad(scores, torch.zeros_like(edges)), scores)
    assert torch.equal(grad(scores, edges, lambda_max=0.0), scores)
    edges[3] = 0
    found = grad(scores, edges)
    assert torch.equal(found[3], scores[3])
    assert not bool(found.isnan().any())
    assert torch.equal(found == -torch.inf, scores == -torch.inf)


def test_scores_may_be_shifted() -> None:
    for shift in (5.0, -50.0):
        torch.testing.assert_close(grad(Z + shift, G) - shift, grad(Z, G))


def test_edges_sum_the_scores_of_what_follows() -> None:
    ids = torch.tensor([1, 2, 1, 2, 3])
    scores = torch.zeros(5, 4, dtype=torch.float64)
    scores[0, 2], scores[1, 1], scores[2, 2], scores[3, 3], scores[4, 0] = 1.5, 2.0, 0.5, -1.0, 9.0
    edges, weights = transition_edges(ids, scores)
    assert dict(zip(map(tuple, edges.tolist()), weights.tolist(), strict=True)) == {(1, 2): 2.0, (2, 1): 2.0}


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="lambda_max is a share"):
        grad(Z, G, lambda_max=1.5)
