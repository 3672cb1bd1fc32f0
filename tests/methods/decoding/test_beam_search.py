"""Beam search's rules: which continuations are looked at, how finished ones compare, when to stop."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.beam_search import best_continuations, may_stop, normalized_score


def test_the_best_in_falling_order_and_the_first_among_equals() -> None:
    totals = torch.tensor([[-3.0, -1.0, -1.0, -2.0, -1.0], [0.0, -torch.inf, -1.0, -torch.inf, 0.0]])
    assert best_continuations(totals, beams=2).tolist() == [[1, 2], [0, 4]]
    assert best_continuations(totals, beams=4).tolist() == [[1, 2, 4, 3], [0, 4, 2, 1]]
    assert best_continuations(totals, beams=9).tolist() == [[1, 2, 4, 3, 0], [0, 4, 2, 1, 3]]
    with pytest.raises(ValueError, match="at least one beam"):
        best_continuations(totals, beams=0)


def test_length_penalty_divides_by_a_power_of_the_length() -> None:
    assert normalized_score(-6.0, 4) == -1.5
    assert normalized_score(-6.0, 4, length_penalty=0.0) == -6.0
    assert normalized_score(-6.0, 4, length_penalty=0.5) == -3.0
    assert normalized_score(-6.0, 4, length_penalty=-1.0) == -24.0


def test_stopping_rules() -> None:
    full = [-1.0, -2.0]
    # The best running beam: sum -6 after 2 tokens, -3 per token; over 10 tokens it could come to -0.6.
    assert not may_stop(full[:1], -6.0, 2, 10, beams=2, early_stopping=True)
    assert may_stop(full, -6.0, 2, 10, beams=2, early_stopping=True)
    assert may_stop(full, -6.0, 2, 10, beams=2)
    assert not may_stop(full, -3.9, 2, 10, beams=2)
    assert may_stop(full, -4.0, 2, 10, beams=2)  # no better than the worst
    assert not may_stop(full, -6.0, 2, 10, beams=2, early_stopping="never")
    assert may_stop(full, -20.0, 2, 10, beams=2, early_stopping="never")
    # Without a length bonus a sum only falls.
    assert may_stop(full, -2.0, 2, 10, beams=2, length_penalty=0.0, early_stopping="never")
    assert not may_stop(full, -1.9, 2, 10, beams=2, length_penalty=0.0, early_stopping="never")
