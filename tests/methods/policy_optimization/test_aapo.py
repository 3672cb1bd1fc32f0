"""AAPO: the lead over the reference's reward joins the group's advantage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.batch import Rollouts
from tokenloom.methods.policy_optimization.aapo import aapo


def against(rollouts: Rollouts, reference: Tensor) -> Rollouts:
    return rollouts.replace(extras={"reference_rewards": reference})


def test_defaults() -> None:
    assert defaults("aapo") == {"low": -0.2, "high": 0.28, "pairing": "row"}
    assert preset_defaults("aapo") == {"low": -0.2, "high": 0.28, "pairing": "row"}
    algorithm = make("aapo")
    assert algorithm.advantage.params == {"eps": 1e-4}
    assert (algorithm.terms, algorithm.surrogate.part.name) == ((), "reinforce/score")
    assert algorithm.rollout_needs == {"reference_rewards"}


@pytest.mark.parametrize(("reward", "reference", "expected"), [(1.0, 0.0, 0.28), (0.0, 1.0, -0.2), (0.5, 0.4, 0.1)])
def test_a_constant_group_still_learns(reward: float, reference: float, expected: float) -> None:
    rollouts = against(rollouts_of([reward] * 4), torch.full((4,), reference).double())
    close(advantages_of(make("aapo"), rollouts), expected, 1e-7)


def test_equal_to_the_reference_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    assert rollouts.rewards is not None
    same = against(rollouts, rollouts.rewards)
    grpo = make("grpo", dialect="trl")  # eps 1e-4
    close(advantages_of(make("aapo"), same, signals), advantages_of(grpo, rollouts, signals))


def test_mixed_group_worked_numbers() -> None:
    # A = +-.5 / (.70711 + 1e-4) twice, leads 1 - .9 = .1 and 0 - .05 = -.05.
    rollouts = against(rollouts_of([1.0, 0.0]), vector(0.9, 0.05))
    close(advantages_of(make("aapo"), rollouts), [[0.7070068 + 0.1], [-0.7070068 - 0.05]], 1e-7)


def test_mean_pairing_compares_with_the_group() -> None:
    reference, group = vector(0.0, 0.4, NAN, 1.0), torch.tensor([0, 0, 0, 1])
    zeros = torch.zeros(4, 1).double()
    close(aapo(zeros, vector(0.3, 0.3, 0.3, 0.9), reference, group, ones(4), pairing="mean"),
          [[0.1], [0.1], [0.0], [-0.1]])  # fmt: skip
    close(aapo(zeros, vector(0.1, 0.3, 0.3, 0.9), reference, group, ones(4)), [[0.1], [-0.1], [0.0], [-0.1]])


def test_rows_without_a_reward_on_either_side_get_no_momentum() -> None:
    found = aapo(torch.zeros(2, 1).double(), vector(NAN, 1.0), vector(0.0, NAN), torch.tensor([0, 0]), ones(2))
    assert bool((found == 0).all())


def test_gradient_is_the_weighted_log_likelihood() -> None:
    # No ratio: off policy the coefficient is A* / tokens all the same.
    rollouts, signals = synthetic_batch()
    rollouts = against(rollouts, torch.linspace(0, 1, 12).double())
    found = coefficients_of(make("aapo"), rollouts, signals)
    advantages = advantages_of(make("aapo"), rollouts, signals)
    close(found, advantages * rollouts.mask / rollouts.mask.sum())
    close(coefficients_of(make("aapo"), rollouts, signals.replace(old_logprobs=signals.logprobs)), found)


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    rollouts = against(rollouts, torch.full((12,), 0.4).double())
    found, plain = (coefficients_of(a, rollouts, signals) for a in (make("aapo"), make("aapo").override(credit=None)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)


def test_missing_reference_rewards_are_named() -> None:
    rollouts = rollouts_of([1.0, 0.0])
    with pytest.raises(ValueError, match="reference_rewards"):
        make("aapo").plan(rollouts, signals_of(rollouts))


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="low=1"):
        aapo(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), torch.tensor([0]), ones(1), low=1.0, high=0.0)
