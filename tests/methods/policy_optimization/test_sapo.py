"""SAPO: a sigmoid gate."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    advantages_of,
    close,
    coefficients_of,
    defaults,
    gradient,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
)
from tokenloom.methods.policy_optimization.sapo import sapo


def slope(ratio: float, advantage: float, **settings: float) -> torch.Tensor:
    return gradient(lambda x: sapo(x, row(advantage), ones(1), **settings), row(ratio).log())[0]


def test_defaults() -> None:
    assert defaults("sapo") == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert preset_defaults("sapo") == {"dialect": "paper"}


def test_objective_worked_numbers() -> None:
    # f(1) = 2 / tau; f(2) at tau 1 is 4 sigmoid(1) = 2.924234.
    close(sapo(row(1.0, 2.0, 1.0).log(), row(1.0, 1.0, -1.0), ones(1, 3)), [[2.0, 2.9242343, -1.9047619]], 1e-7)


def test_on_policy_gradient_is_the_advantage() -> None:
    for advantage in (1.7, -0.4, 0.0):
        close(slope(1.0, advantage), advantage)


@pytest.mark.parametrize(("advantage", "gate"), [(1.0, 0.786448), (-1.0, 0.768110)])
def test_gate_at_ratio_two(advantage: float, gate: float) -> None:
    close(slope(2.0, advantage), 2 * gate * advantage, 1e-6)


@pytest.mark.parametrize("away", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gate_is_symmetric_around_one_and_at_most_one(away: float, advantage: float) -> None:
    above, below = slope(1 + away, advantage) / (1 + away), slope(1 - away, advantage) / (1 - away)
    close(above, below)
    assert 0 < abs(above.item()) < 1


def test_a_hotter_gate_closes_faster() -> None:
    assert slope(2.0, 1.0, tau_pos=3.0) < slope(2.0, 1.0)
    close(slope(2.0, 1.0, tau_neg=9.0), slope(2.0, 1.0))


def test_zero_advantage_and_huge_ratios() -> None:
    close(sapo(row(3.0).log(), row(0.0), ones(1)), 0.0)
    close(slope(3.0, 0.0), 0.0)
    found = sapo(torch.tensor([[90.0, -90.0]]), torch.tensor([[1.0, -1.0]]), ones(1, 2))
    close(found, [[4.0, -4 / 1.05 * torch.sigmoid(torch.tensor(-1.05)).item()]], 1e-6)
    close(gradient(lambda x: sapo(x, torch.ones(1, 2), ones(1, 2)), torch.tensor([[90.0, -90.0]]))[0], 0.0)


@pytest.mark.parametrize("wrong", [{"tau_pos": 0.0}, {"tau_neg": -1.0}])
def test_temperatures_must_be_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        sapo(row(0.0), row(1.0), ones(1), **wrong)


def test_dialects() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0], mask=[[1, 1], [1, 0], [1, 0], [0, 0]])
    signals = signals_of(rollouts, row(2.0, 2.0).log())
    paper, trl = make("sapo"), make("sapo", dialect="trl")
    close(advantages_of(trl, rollouts, signals)[0], 1.4997001, 1e-7)
    # A row's tokens share 1 / (rows x length): three live rows, or TRL's four.
    close(coefficients_of(paper, rollouts, signals)[0], 1.4999970 * 2 * 0.7864477 / 6, 1e-6)
    close(coefficients_of(trl, rollouts, signals)[0], 1.4997001 * 2 * 0.7864477 / 8, 1e-6)
