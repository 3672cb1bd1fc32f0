"""Rectification: the worked example, the caps in the limit, and values learned on a chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.rectification import caps, feasible, rectify, sarsa_loss

SCORES = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
VALUES = torch.tensor([[-0.8, -0.1, 0.0]], dtype=torch.float64)


def test_worked_numbers() -> None:
    two = rectify(SCORES, VALUES, epsilon=0.0).softmax(-1)
    torch.testing.assert_close(two, torch.tensor([[3 / 13, 7.5 / 13, 2.5 / 13]], dtype=torch.float64))
    many = rectify(SCORES, VALUES, epsilon=0.0, rounds=1000).softmax(-1)
    torch.testing.assert_close(many, torch.tensor([[0.2, 0.6, 0.2]], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_in_the_limit_every_token_is_under_its_cap(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(20, 6, generator=g, dtype=torch.float64)
    values = -torch.rand(20, 6, generator=g, dtype=torch.float64)
    found = rectify(scores, values, rounds=20_000).softmax(-1)
    fits = feasible(scores, values)
    assert bool(fits.any())
    assert bool((found <= caps(values, 0.1) + 1e-6)[fits].all())


def test_safe_states_are_left_alone() -> None:
    assert torch.equal(rectify(SCORES, torch.zeros(1, 3, dtype=torch.float64), epsilon=0.0), SCORES)
    assert torch.equal(rectify(SCORES, torch.full((1, 3), 0.7, dtype=torch.float64), epsilon=0.0), SCORES)


def test_dead_ends_are_told_and_stay_finite() -> None:
    values = torch.full((1, 3), -1.0, dtype=torch.float64)
    assert feasible(SCORES, values).tolist() == [False]
    assert feasible(SCORES, VALUES, epsilon=0.0).tolist() == [True]
    masked = SCORES.masked_fill(torch.tensor([[False, True, True]]), -torch.inf)
    assert feasible(masked, VALUES, epsilon=0.0).tolist() == [False]
    torch.testing.assert_close(rectify(SCORES, values).softmax(-1), torch.full((1, 3), 1 / 3, dtype=torch.float64))
    assert rectify(masked, VALUES).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


# States 0, 1 and the end; actions 0, 1. From 0: action 0 ends well, action 1 leads to 1. In 1 the policy takes action 0
# with 0.3, which ends badly with 0.8, else action 1, which ends badly with 0.1.
PATHS = [
    (((0, 0),), 0.4, 0.0),
    (((0, 1), (1, 0)), 0.6 * 0.3, 0.8),
    (((0, 1), (1, 1)), 0.6 * 0.7, 0.1),
]
TRUE = torch.tensor([[0.0, -(0.3 * 0.8 + 0.7 * 0.1)], [-0.8, -0.1]], dtype=torch.float64)


def expected_gradient(table: Tensor, copy: Tensor) -> Tensor:
    table = table.clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for path, share, bad in PATHS:
        s, a = torch.tensor(path).T[:, None]
        mask = torch.ones_like(s, dtype=torch.bool)
        for reward, probability in ((-1.0, bad), (0.0, 1 - bad)):
            loss = sarsa_loss(table[s, a], copy[s, a], torch.tensor([reward], dtype=torch.float64), mask)
            total = total + share * probability * loss
    (gradient,) = torch.autograd.grad(total, table)
    return gradient


def test_sarsa_converges_to_the_probability_of_undesired_texts() -> None:
    table = torch.full((2, 2), -0.5, dtype=torch.float64)
    copy = table.clone()
    for _ in range(600):
        table -= 2.0 * expected_gradient(table, copy)
        copy += 0.5 * (table - copy)
    torch.testing.assert_close(table, TRUE, rtol=0, atol=1e-9)


def test_loss_by_hand() -> None:
    values = torch.tensor([[-0.5, -0.2], [-0.4, torch.nan]], dtype=torch.float64, requires_grad=True)
    following = torch.tensor([[9.0, 0.3], [9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = sarsa_loss(values, following, torch.tensor([-1.0, 0.0]), mask)
    # Targets: 0.3 clamped to 0; the rewards -1 and 0.
    assert loss.item() == pytest.approx((0.25 + 0.64 + 0.16) / 3, abs=1e-12)
    loss.backward()
    assert following.grad is None
    assert values.grad is not None
    assert float(values.grad[1, 1]) == 0.0
    discounted = sarsa_loss(values, -following, torch.tensor([-1.0, 0.0]), mask, gamma=0.5)
    assert discounted.item() == pytest.approx((0.35**2 + 0.64 + 0.16) / 3, abs=1e-12)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="rounds >= 1"):
        rectify(SCORES, VALUES, rounds=0)
    with pytest.raises(ValueError, match="at least one token"):
        sarsa_loss(VALUES, VALUES, torch.zeros(1), torch.zeros(1, 3, dtype=torch.bool))
