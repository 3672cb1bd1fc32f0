"""CyclicReflex: the waves."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.cyclicreflex import cyclicreflex, triangle


def test_worked_numbers() -> None:
    at = torch.tensor([0, 75, 150, 300, 450, 525, 600])
    expected = torch.tensor([0, 2.5, 5, 0, -5, -2.5, 0], dtype=torch.float64)
    torch.testing.assert_close(triangle(at, amplitude=5.0, period=600.0), expected)
    shifted = triangle(at, amplitude=5.0, period=600.0, shift=0.25)
    torch.testing.assert_close(shifted, triangle(at + 150, amplitude=5.0, period=600.0))


def test_the_mean_over_a_period_is_zero() -> None:
    for shift in (0.0, 0.3):
        assert abs(float(triangle(torch.arange(1200), amplitude=5.0, period=1200.0, shift=shift).mean())) < 1e-9


def test_only_reflection_tokens_of_thinking_rows_in_the_range_move() -> None:
    scores = torch.zeros(4, 6, dtype=torch.float64)
    generated = torch.tensor([150, 150, 9, 450])
    thinking = torch.tensor([True, False, True, True])
    found = cyclicreflex(scores, generated, thinking, torch.tensor([1, 4]), period=600.0, start=10, stop=450)
    expected = torch.zeros_like(scores)
    expected[0, [1, 4]] = 5.0
    assert torch.equal(found, expected)
    assert torch.equal(scores, torch.zeros_like(scores))


def test_without_amplitude_nothing_moves_and_constant_is_the_penalty() -> None:
    scores = torch.randn(2, 6, dtype=torch.float64)
    generated, thinking, ids = torch.tensor([150, 7]), torch.tensor([True, True]), torch.tensor([1])
    assert torch.equal(cyclicreflex(scores, generated, thinking, ids, amplitude=0.0), scores)
    found = cyclicreflex(scores, generated, thinking, ids, amplitude=-3.0, schedule="constant")
    torch.testing.assert_close(found - scores, torch.tensor([[0, -3.0, 0, 0, 0, 0]] * 2, dtype=torch.float64))


def test_a_period_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        triangle(torch.tensor([1]), amplitude=1.0, period=0.0)
