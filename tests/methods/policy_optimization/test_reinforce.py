"""REINFORCE: reward minus a baseline times the score, on policy and off."""

from __future__ import annotations

import torch

from methods.policy_optimization.batch import (
    NAN,
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
    vector,
)
from tokenloom.methods.policy_optimization.reinforce import reinforce, running_baseline, score


def test_defaults() -> None:
    assert defaults("reinforce") == {"baseline": 0.0}
    assert defaults("reinforce/running-baseline") == {"decay": 0.9}
    assert preset_defaults("reinforce") == {"running_baseline": True}


def test_advantage_is_the_reward_minus_a_constant() -> None:
    rewards = vector(1.0, 0.0, NAN)
    close(reinforce(rewards, ones(3)), [[1.0], [0.0], [0.0]])
    close(reinforce(rewards, ones(3), baseline=0.25), [[0.75], [-0.25], [0.0]])


def test_advantage_covers_sampled_tokens_only() -> None:
    close(reinforce(vector(2.0), torch.tensor([[True, False, True, False]])), [[2.0, 0.0, 2.0, 0.0]])


def test_gradient_is_the_advantage_whatever_the_ratio() -> None:
    objective = score(row(-0.3, -7.0), row(0.5, -2.0), ones(1, 2))
    close(objective, [[-0.15, 14.0]])
    (found,) = gradient(lambda lp: score(lp, row(0.5, -2.0), ones(1, 2)), row(-0.3, -7.0))
    close(found, [[0.5, -2.0]])


def test_coefficient_is_scale_times_advantage_off_policy_too() -> None:
    rollouts = rollouts_of([1.0, -3.0], mask=[[1, 1, 1], [1, 0, 0]])
    algorithm = make("reinforce", running_baseline=False)
    expected = [[0.25, 0.25, 0.25], [-0.75, 0.0, 0.0]]
    close(coefficients_of(algorithm, rollouts), expected)
    close(coefficients_of(algorithm, rollouts, signals_of(rollouts, 1.7)), expected)


def test_running_baseline_follows_the_batches() -> None:
    advantages, state = running_baseline(vector(1.0, 0.0), ones(2), None)
    close(advantages, [[0.5], [-0.5]])
    assert state == {"baseline": 0.5}
    advantages, state = running_baseline(vector(1.0, 1.0, NAN), ones(3), state)
    close(advantages, [[0.5], [0.5], [0.0]])
    assert state is not None
    assert abs(state["baseline"] - 0.55) < 1e-12  # 0.9 * 0.5 + 0.1 * 1


def test_a_batch_without_rewards_leaves_the_baseline_alone() -> None:
    advantages, state = running_baseline(vector(NAN, NAN), ones(2), {"baseline": 0.5})
    close(advantages, 0.0)
    assert state == {"baseline": 0.5}
    assert running_baseline(vector(NAN), ones(1), None)[1] is None


def test_preset_carries_its_state_from_plan_to_plan() -> None:
    algorithm, first = make("reinforce"), rollouts_of([1.0, 0.0])
    plan = algorithm.plan(first, signals_of(first))
    close(plan.values["advantages"], [[0.5], [-0.5]])
    second = rollouts_of([1.0, 1.0])
    close(advantages_of(algorithm, second, state=plan.state), 0.5)
