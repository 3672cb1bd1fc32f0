"""CISPO: the weight is capped, the gradient is kept."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    INF,
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
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.cispo import cispo
from tokenloom.methods.policy_optimization.importance import importance
from tokenloom.methods.policy_optimization.ppo_clip import ppo_clip


def test_defaults() -> None:
    assert defaults("cispo") == {}
    assert preset_defaults("cispo") == {"dialect": "paper", "high": None}


def test_worked_numbers() -> None:
    log_ratio, advantages, logprobs = row(0.5, 1.1, 7.0).log(), row(1.0, -2.0, 1.0), row(-1.0, -0.5, -3.0)
    close(cispo(log_ratio, advantages, logprobs, ones(1, 3)), [[-0.5, 1.1, -15.0]])
    close(cispo(log_ratio, advantages, logprobs, ones(1, 3), 0.8, 1.2), [[-0.8, 1.1, -3.6]])


def test_gradient_is_the_capped_ratio_times_the_advantage() -> None:
    old, advantages = row(-2, -2, -2, -2), row(1.0, -1.0, 1.0, 0.0)

    def objective(logprobs: torch.Tensor) -> torch.Tensor:
        return cispo(logprobs - old, advantages, logprobs, ones(1, 4), 0.8, 1.2)

    close(gradient(objective, old + row(0.5, 0.5, 1.1, 9.0).log())[0], [[0.8, -0.8, 1.1, 0.0]])


def test_no_token_is_dropped_and_inside_it_is_ppo() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("cispo")
    found, advantages = (f(algorithm, rollouts, signals) for f in (coefficients_of, advantages_of))
    assert bool(((found != 0) == (advantages != 0)).all())
    old, a = row(-1, -1, -1), row(1.0, -1.0, 2.0)
    inside = old + row(0.81, 1.0, 1.19).log()
    one = gradient(lambda x: cispo(x - old, a, x, ones(1, 3), 0.8, 1.2), inside)[0]
    close(one, gradient(lambda x: ppo_clip(x - old, a, ones(1, 3), 0.8, 1.2), inside)[0])


def test_without_limits_it_has_the_gradient_of_importance_sampling() -> None:
    old, a = row(-1, -1, -1), row(1.0, -1.0, 2.0)
    far = old + row(0.01, 1.0, 40.0).log()
    one = gradient(lambda x: cispo(x - old, a, x, ones(1, 3), 0.0, INF), far)[0]
    close(one, gradient(lambda x: importance(x - old, a, ones(1, 3)), far)[0])


@pytest.mark.parametrize(
    ("dialect", "high", "limits"),
    [
        ("paper", None, (0.0, 5.0)),
        ("trl", None, (0.0, 5.0)),
        ("trl", 5.0, (0.0, 5.0)),
        ("verl", None, (0.8, 1.2)),
        ("verl", 5.0, (0.8, 6.0)),
    ],
)
def test_high_is_absolute_in_trl_and_a_distance_in_verl(
    dialect: str, high: float | None, limits: tuple[float, float]
) -> None:
    rollouts = rollouts_of([1.0, 1.0, 1.0, 0.0])
    ratios = vector(0.5, 5.5, 9.0, 1.0)
    algorithm = make("cispo", dialect=dialect, high=high)
    signals = signals_of(rollouts, ratios.log()[:, None])
    advantages = advantages_of(algorithm, rollouts, signals).squeeze(-1)
    found = coefficients_of(algorithm, rollouts, signals).squeeze(-1)
    close(found, ratios.clamp(*limits) * advantages / 4)


def test_epsilon_of_the_dialects() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0])
    close(advantages_of(make("cispo", dialect="trl"), rollouts)[0], 1.4997001, 1e-7)
    close(advantages_of(make("cispo", dialect="verl"), rollouts)[0], 1.4999970, 1e-7)
