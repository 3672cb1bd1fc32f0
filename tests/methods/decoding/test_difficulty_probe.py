"""Difficulty probe: on a chain the losses' fixed point is the true success probability; budgets and AUROC by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.difficulty_probe import auroc, samples_for, td_loss, two_levels

# A chain: from 0 to 1 (0.7) or 2 (0.3); from 1 to 2 (0.5) or to 3; an answer that ends in 2 is right with
# probability 0.2, in 3 with 0.9. Trajectories with their probabilities, rewards as 0 or 1.
PATHS = [((0, 1, 2), 0.35, 0.2), ((0, 1, 3), 0.35, 0.9), ((0, 2), 0.3, 0.2)]
TRUE = [0.35 * 0.2 + 0.35 * 0.9 + 0.3 * 0.2, 0.5 * 0.2 + 0.5 * 0.9, 0.2, 0.9]


def expected_gradient(table: Tensor, monte_carlo: bool) -> Tensor:
    table = table.clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for path, share, right in PATHS:
        states = torch.tensor([path])
        for reward, probability in ((1.0, right), (0.0, 1 - right)):
            loss = td_loss(
                table[states],
                torch.tensor([reward], dtype=torch.float64),
                torch.ones_like(states, dtype=torch.bool),
                monte_carlo=monte_carlo,
            )
            total = total + share * probability * loss
    (gradient,) = torch.autograd.grad(total, table)
    return gradient


@pytest.mark.parametrize("monte_carlo", [False, True])
def test_the_fixed_point_is_the_success_probability(monte_carlo: bool) -> None:
    true = torch.tensor(TRUE, dtype=torch.float64)
    torch.testing.assert_close(
        expected_gradient(true, monte_carlo), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
    )
    table = torch.full((4,), 0.5, dtype=torch.float64)
    for _ in range(600):
        table -= 0.3 * expected_gradient(table, monte_carlo)
    torch.testing.assert_close(table, true, rtol=0, atol=1e-9)


def test_loss_by_hand_and_padding_is_silent() -> None:
    values = torch.tensor([[0.5, 0.2, math.nan], [0.1, 0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    td = (0.3**2 + 0.8**2 + 0.3**2 + 0.5**2 + 0.9**2) / 2
    mc = (0.5**2 + 0.8**2 + 0.1**2 + 0.4**2 + 0.9**2) / 2
    assert td_loss(values, rewards, mask).item() == pytest.approx(td, abs=1e-12)
    loss = td_loss(values, rewards, mask, monte_carlo=True)
    assert loss.item() == pytest.approx(mc, abs=1e-12)
    loss.backward()
    assert values.grad is not None
    assert float(values.grad[0, 2]) == 0.0


def test_targets_are_detached() -> None:
    values = torch.tensor([[0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    td_loss(values, torch.tensor([0.2], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)).backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.6, 0.0], abs=1e-12)


def test_budgets() -> None:
    assert samples_for(torch.tensor([0.0, 0.01, 0.6, 1.0, 3.0]), n_min=1, n_max=6).tolist() == [1, 2, 4, 6, 6]
    assert samples_for(torch.tensor([0.3, 0.9]), n_min=4, n_max=4).tolist() == [4, 4]
    assert two_levels(torch.tensor([0.2, 0.5, 0.8]), n_min=2, n_max=9).tolist() == [2, 2, 9]
    with pytest.raises(ValueError, match="n_min <= n_max"):
        samples_for(torch.tensor([0.5]), n_min=3, n_max=2)


def test_auroc_counts_pairs() -> None:
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 1, 0, 1])
    assert auroc(scores, labels) == pytest.approx(3.5 / 4)
    assert auroc(-scores, labels) == pytest.approx(0.5 / 4)
    assert math.isnan(auroc(scores, torch.ones(4)))


def test_an_empty_row_is_named() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        td_loss(torch.ones(1, 2), torch.ones(1), torch.zeros(1, 2, dtype=torch.bool))
