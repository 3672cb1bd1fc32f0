"""Contrastive search's rules."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.contrastive_search import contrastive_scores, largest_cosine


def test_worked_scores() -> None:
    p = torch.tensor([[0.5, 0.4]], dtype=torch.float64)
    scores = contrastive_scores(p, torch.tensor([[0.95, 0.20]], dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor([[-0.37, 0.04]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(contrastive_scores(p, torch.ones(1, 2).double(), alpha=0.0), p)
    # What cannot follow is not chosen for being different.
    assert contrastive_scores(torch.tensor([[0.9, 0.0]]), torch.tensor([[1.0, -1.0]]))[0, 1] == -torch.inf
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        contrastive_scores(p, p, alpha=1.1)


def test_largest_cosine_over_what_is_real() -> None:
    context = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [0.0, 9.0]], [[-1.0, 0.0], [0.0, 0.0], [5.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    candidates = torch.tensor([[[0.0, 3.0], [1.0, 0.0]], [[3.0, 0.0], [0.0, 1.0]]])
    found = largest_cosine(candidates, context, mask)
    # The zero vector has cosine 0 with everything.
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 1.0], [0.0, 0.0]]))
