"""GAE and the clipped value loss."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    defaults,
    gradient,
    loss_of,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
)
from tokenloom.masked import whiten
from tokenloom.methods.policy_optimization.ppo_gae import gae, ppo_gae, scored_tokens, value_loss
from tokenloom.methods.policy_optimization.reinforce_pp import discounted_returns

REWARDS, VALUES = row(0, 0, 1), row(0.2, 0.5, 0.7)


def test_defaults() -> None:
    assert defaults("ppo-gae") == {"gamma": 1.0, "lam": 0.95, "whitened": True}
    assert defaults("ppo-gae/value-loss") == {"clip": 0.5}
    found = preset_defaults("ppo-gae")
    assert (found["lam"], found["gamma"], found["low"], found["high"]) == (0.95, 1.0, 0.2, 0.2)
    assert (found["value_coef"], found["kl_coef"], found["epochs"], found["mini_batches"]) == (0.5, 0.0, 1, 1)


@pytest.mark.parametrize(
    ("lam", "expected"), [(1.0, [0.8, 0.5, 0.3]), (0.0, [0.3, 0.2, 0.3]), (0.5, [0.475, 0.35, 0.3])]
)
def test_worked_numbers(lam: float, expected: list[float]) -> None:
    found = ppo_gae(REWARDS, VALUES, ones(1, 3), lam=lam, whitened=False)
    close(found["advantages"], [expected])
    close(found["returns"], [[a + v for a, v in zip(expected, (0.2, 0.5, 0.7), strict=True)]])


def test_discount() -> None:
    # deltas 0.25 - 0.2, 0.35 - 0.5, 1 - 0.7; A = delta + 0.25 A'.
    found = ppo_gae(REWARDS, VALUES, ones(1, 3), gamma=0.5, lam=0.5, whitened=False)["advantages"]
    close(found, [[0.05 - 0.25 * 0.075, -0.075, 0.3]])


def test_tool_output_passes_value_and_advantage_through() -> None:
    mask = torch.tensor([[True, True, False, False, True, False]])
    rewards, values = row(0, 0, 50, NAN, 1, NAN), row(0.2, 0.5, -9, NAN, 0.7, 3)
    for lam, expected in ((1.0, [0.8, 0.5, 0.3]), (0.5, [0.475, 0.35, 0.3])):
        found = ppo_gae(rewards, values, mask, lam=lam, whitened=False)
        close(found["advantages"], [[expected[0], expected[1], 0, 0, expected[2], 0]])
        close(found["returns"], [[expected[0] + 0.2, expected[1] + 0.5, 0, 0, expected[2] + 0.7, 0]])


def test_without_a_critic_and_lambda_one_it_is_the_return() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.values is not None
    found = ppo_gae(signals.values, torch.zeros_like(signals.values), rollouts.mask, lam=1.0, whitened=False)
    close(found["advantages"], discounted_returns(signals.values, rollouts.mask))


def test_whitened_over_the_sampled_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.5, 0.7], [0.4, 5.0, 5.0]], dtype=torch.float64)
    # 0.8, 0.5, 0.3, -0.4: mean 0.3, squares 0.25 + 0.04 + 0 + 0.49 = 0.78, Bessel variance 0.26.
    found = ppo_gae(rewards, values, mask, lam=1.0)["advantages"]
    close(found, torch.tensor([[0.5, 0.2, 0.0], [-0.7, 0, 0]], dtype=torch.float64) / 0.26**0.5, 1e-6)


def test_an_unscorable_row_gives_nothing_and_disturbs_nothing() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, NAN]], dtype=torch.float64)
    values = VALUES.repeat(2, 1)
    both = ppo_gae(rewards, values, ones(2, 3))
    alone = ppo_gae(REWARDS, VALUES, ones(1, 3))
    close(both["advantages"][:1], alone["advantages"])
    close(both["advantages"][1], 0.0)
    # Its critic target is its own value: no gradient from a reward that is not known.
    close(both["returns"][1:], VALUES)
    assert scored_tokens(rewards, ones(2, 3)).tolist() == [[True] * 3, [False] * 3]


def test_nothing_sampled() -> None:
    empty = torch.zeros(2, 0)
    assert ppo_gae(empty, empty, torch.zeros(2, 0, dtype=torch.bool))["advantages"].shape == (2, 0)
    close(ppo_gae(REWARDS, VALUES, ~ones(1, 3))["advantages"], 0.0)


def test_lambda_may_differ_by_row() -> None:
    lam = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    found = gae(REWARDS.repeat(2, 1), VALUES.repeat(2, 1), ones(2, 3), 1.0, lam)
    close(found, [[0.8, 0.5, 0.3], [0.3, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.6, 0.045, -0.3),  # within 0.2 +- 0.5: (0.6 - 0.9)^2 / 2
        (1.0, 0.02, 0.0),  # clipped to 0.7: (0.7 - 0.9)^2 / 2 exceeds (1.0 - 0.9)^2 / 2 and has no slope
        (1.5, 0.18, 0.6),  # clipped to 0.7, but (1.5 - 0.9)^2 / 2 is larger
    ],
)
def test_value_loss_worked_numbers(value: float, loss: float, slope: float) -> None:
    def of(v: torch.Tensor) -> torch.Tensor:
        return value_loss(v, row(0.9), ones(1), row(0.2))

    close(of(row(value)), loss)
    close(gradient(of, row(value))[0], slope)


def test_value_loss_without_clip() -> None:
    close(value_loss(row(1.0), row(0.9), ones(1), row(0.2), clip=None), 0.005)
    close(value_loss(row(1.0), row(0.9), ones(1)), 0.005)


def test_preset_loss_adds_up() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]])
    old = torch.tensor([[0.5, 0.5], [0.5, 9.0]], dtype=torch.float64)
    signals = signals_of(rollouts, values=old + 0.2, old_values=old)
    # lam = 1: A = 0.5, 0.5, -0.5 (before whitening), returns 1, 1, 0; values 0.7: (0.09 + 0.09 + 0.49) / 2 / 3.
    algorithm = make("ppo-gae", lam=1.0)
    white = whiten(torch.tensor([[0.5, 0.5], [-0.5, 0.0]], dtype=torch.float64), rollouts.mask)
    expected = -white[rollouts.mask].mean() + 0.5 * 0.67 / 6
    close(loss_of(algorithm, rollouts, signals), expected)
    found = algorithm.coefficients(rollouts, signals)
    close(found["logprobs"], white / 3)
    close(found["values"], [[0.05, 0.05], [-0.7 / 6, 0.0]])


def test_preset_with_kl_puts_it_into_the_token_rewards() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 1]])
    signals = signals_of(rollouts, ref_logprobs=torch.full((2, 2), -2.0, dtype=torch.float64))
    signals = signals.replace(values=torch.zeros(2, 2).double(), old_values=torch.zeros(2, 2).double())
    algorithm = make("ppo-gae", kl_coef=0.1, lam=1.0).override(advantage={"whitened": False})
    close(coefficients_of(algorithm, rollouts, signals), [[0.2, 0.225], [-0.05, -0.025]])
