"""PPO's clip: worked numbers on every side of it, limits, tensor bounds."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    INF,
    close,
    coefficients_of,
    gradient,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.importance import importance
from tokenloom.methods.policy_optimization.ppo_clip import ppo_clip


def test_defaults() -> None:
    assert preset_defaults("ppo-clip") == {"low": 0.2, "high": 0.2, "epochs": 4, "mini_batches": 1}


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.5, 1.0, 1.2, 0.0),
        (1.5, -1.0, -1.5, -1.5),
        (0.5, 1.0, 0.5, 0.5),
        (0.5, -1.0, -0.8, 0.0),
        (1.0, 2.5, 2.5, 2.5),
        (1.0, -2.5, -2.5, -2.5),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_worked_numbers(ratio: float, advantage: float, objective: float, slope: float) -> None:
    log_ratio = row(ratio).log()
    close(ppo_clip(log_ratio, row(advantage), ones(1)), objective)
    close(gradient(lambda x: ppo_clip(x, row(advantage), ones(1)), log_ratio)[0], slope)


def test_asymmetric_and_tensor_bounds() -> None:
    log_ratio, advantages = row(1.25, 1.25, 0.7).log(), row(1.0, 1.0, -1.0)
    close(ppo_clip(log_ratio, advantages, ones(1, 3), 0.8, 1.28), [[1.25, 1.25, -0.8]])
    found = ppo_clip(log_ratio, advantages, ones(1, 3), row(0.8, 0.8, 0.6), row(1.1, 1.28, 1.1))
    close(found, [[1.1, 1.25, -0.7]])
    close(ppo_clip(log_ratio, advantages, ones(1, 3), 0.8, row(1.1, 1.28, 1.1)), [[1.1, 1.25, -0.8]])


def test_infinite_bounds_are_importance_sampling() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    log_ratio, advantages, mask = 5 * signals.logprobs, signals.logprobs + 1, rollouts.mask
    wide = gradient(lambda x: ppo_clip(x, advantages, mask, 0.0, INF), log_ratio)[0]
    close(wide, gradient(lambda x: importance(x, advantages, mask), log_ratio)[0])


def test_hostile_ratios_stay_finite() -> None:
    mask = torch.tensor([[True, True, False]])
    hostile = torch.tensor([[200.0, -200.0, float("nan")]])
    found = ppo_clip(hostile, torch.tensor([[-1.0, 1.0, 1.0]]), mask)
    assert bool(found.isfinite().all())
    (slope,) = gradient(lambda x: ppo_clip(x, torch.tensor([[-1.0, 1.0, 1.0]]), mask), hostile)
    close(slope, 0.0)


def test_preset_makes_four_epochs() -> None:
    rollouts = rollouts_of([1.0, 0.0])
    assert len(make("ppo-clip").plan(rollouts, signals_of(rollouts)).updates) == 4


def test_preset_clips_the_second_epoch() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0])
    found = coefficients_of(make("ppo-clip"), rollouts, signals_of(rollouts, [[0.5], [0.1], [-0.5], [0.0]]))
    # Whitened 1.5, -0.5; e^0.5 is past 1.2 for A > 0, e^-0.5 below 0.8 for A < 0.
    close(found.squeeze(-1), [0.0, -0.125 * 1.1051709, 0.0, -0.125], 1e-6)
