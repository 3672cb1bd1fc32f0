"""Locally constrained decoding: masked and renormalized, its missing weight proper."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.draw import expectation
from tokenloom.methods.decoding.locally_constrained import locally_constrained, masked_token

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
VALID = torch.tensor([False, True, False, True, True])


def test_masked_and_renormalized() -> None:
    law = locally_constrained(P.log()[None], VALID[None]).softmax(-1)
    expected = torch.tensor([[0, 0.3, 0, 0.1, 0.05]], dtype=torch.float64) / 0.45
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


def test_the_weight_is_proper_at_any_scale() -> None:
    total = expectation(lambda draw: _weighted(P.log() + 700.0, draw))
    for token in (1, 3, 4):
        assert total[token] == pytest.approx(float(P[token]), abs=1e-9)
    assert set(total) == {1, 3, 4}


def _weighted(logw: torch.Tensor, draw: object) -> tuple[int, float]:
    token, log_weight = masked_token(logw, VALID, draw)  # type: ignore[arg-type]
    return token, math.exp(log_weight - 700.0)


def test_nothing_allowed() -> None:
    with pytest.raises(ValueError, match="allows no token"):
        locally_constrained(torch.zeros(2, 3), torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match="allows no token"):
        locally_constrained(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[False, True]]))
    none = torch.zeros(5, dtype=torch.bool)
    assert masked_token(P.log(), none, None) == (-1, -math.inf)  # type: ignore[arg-type]
