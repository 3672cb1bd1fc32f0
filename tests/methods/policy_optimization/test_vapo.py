"""VAPO: length-adaptive lambda, decoupled targets, positive examples, value pretraining."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    defaults,
    loss_of,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.ppo_gae import ppo_gae
from tokenloom.methods.policy_optimization.vapo import (
    adaptive_lambda,
    positive,
    positive_nll,
    value_pretraining,
    vapo,
)


def test_defaults() -> None:
    found = {"alpha": 0.05, "gamma": 1.0, "critic_lam": 1.0, "policy_lam": None, "whitened": True}
    assert defaults("vapo") == found
    assert defaults("vapo/value-pretraining") == {"steps": 50}
    assert defaults("vapo/positive") == {"threshold": 0.5}
    expected = {"alpha": 0.05, "positive_coef": 0.1, "value_coef": 0.5, "value_pretraining": 50}
    assert preset_defaults("vapo") == expected
    algorithm = make("vapo")
    assert algorithm.bounds.params == {"low": 0.2, "high": 0.28}
    assert algorithm.aggregate.part.name == "token-mean"


@pytest.mark.parametrize(
    ("length", "lam"), [(0, 0.0), (1, 0.0), (10, 0.0), (20, 0.0), (40, 0.5), (100, 0.8), (1000, 0.98)]
)
def test_lambda_of_the_length(length: int, lam: float) -> None:
    mask = torch.arange(1000)[None] < length
    close(adaptive_lambda(mask), lam, 1e-6)


def test_length_counts_sampled_tokens() -> None:
    mask = torch.arange(200)[None] % 2 == 0
    close(adaptive_lambda(mask), 0.8, 1e-6)
    close(adaptive_lambda(mask, alpha=0.1), 0.9, 1e-6)


def test_policy_and_critic_use_different_lambdas() -> None:
    # Three tokens are far below 20, so lambda 0 for the policy and 1 for the critic.
    found = vapo(row(0, 0, 1), row(0.2, 0.5, 0.7), ones(1, 3), whitened=False)
    close(found["advantages"], [[0.3, 0.2, 0.3]])
    close(found["returns"], 1.0)
    # alpha = 2/3: lambda = 1 - 1 / 2.
    found = vapo(row(0, 0, 1), row(0.2, 0.5, 0.7), ones(1, 3), whitened=False, alpha=2 / 3)
    close(found["advantages"], [[0.475, 0.35, 0.3]], 1e-6)


def test_rows_of_different_length_get_their_own_lambda() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    values = row(0.2, 0.5, 0.7).repeat(2, 1)
    found = vapo(rewards, values, mask, whitened=False, alpha=2 / 3)
    close(found["advantages"], [[0.475, 0.35, 0.3], [0.8, 0, 0]], 1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_equal_lambdas_are_gae(lam: float) -> None:
    rollouts, signals = synthetic_batch()
    assert signals.old_values is not None
    rewards = torch.where(rollouts.mask, signals.old_values, torch.zeros(12, 8).double())
    rewards[6, 0] = NAN
    one = vapo(rewards, signals.old_values, rollouts.mask, critic_lam=lam, policy_lam=lam)
    two = ppo_gae(rewards, signals.old_values, rollouts.mask, lam=lam)
    for name in ("advantages", "returns"):
        close(one[name], two[name])


def test_equal_lambdas_without_positive_examples_are_ppo() -> None:
    rollouts, signals = synthetic_batch()
    recipe = make("vapo", positive_coef=0.0, value_pretraining=0)
    recipe = recipe.override(advantage={"critic_lam": 0.9, "policy_lam": 0.9})
    ppo = make("ppo-gae", lam=0.9, high=0.28).override(terms={"ppo-gae/value-loss": {"clip": None}})
    one, two = (a.coefficients(rollouts, signals) for a in (recipe, ppo))
    for name in ("logprobs", "values"):
        close(one[name], two[name])


def test_nothing_sampled() -> None:
    empty = torch.zeros(2, 0)
    assert vapo(empty, empty, torch.zeros(2, 0, dtype=torch.bool))["returns"].shape == (2, 0)


def test_positive_examples_are_the_right_responses() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    close(positive(vector(1.0, 0.5, NAN), mask), [[1, 1], [0, 0], [0, 0]])
    close(positive(vector(0.2, 0.1, -1.0), mask, threshold=0.0), [[1, 1], [1, 0], [0, 0]])
    close(positive_nll(row(-0.5, -9.0), torch.tensor([[True, False]])), [[0.5, 0.0]])


def nll_only(coef: float) -> dict[str, float]:
    return {"positive_coef": coef, "value_coef": 0.0, "value_pretraining": 0}


def test_likelihood_term_averages_over_the_tokens_of_right_responses() -> None:
    rollouts = rollouts_of([1.0, 1.0, 0.0], [0, 0, 0], mask=[[1, 1], [1, 0], [1, 1]])
    values = torch.zeros(3, 2).double()
    signals = signals_of(rollouts, values=values, old_values=values)
    with_term, without = (coefficients_of(make("vapo", **nll_only(c)), rollouts, signals) for c in (0.1, 0.0))
    close(with_term - without, torch.tensor([[1, 1], [1, 0], [0, 0]]) * 0.1 / 3, 1e-7)
    # Every right token has log-prob -1: the mean NLL is 1.
    difference = loss_of(make("vapo", **nll_only(0.1)), rollouts, signals) - loss_of(
        make("vapo", **nll_only(0.0)), rollouts, signals
    )
    close(difference, 0.1, 1e-7)


def test_no_right_response_no_likelihood_term() -> None:
    rollouts = rollouts_of([0.0, 0.0], mask=[[1, 1], [1, 0]])
    values = torch.tensor([[0.1, 0.4], [0.3, 0.0]]).double()
    signals = signals_of(rollouts, values=values, old_values=values)
    with_term, without = (coefficients_of(make("vapo", **nll_only(c)), rollouts, signals) for c in (9.0, 0.0))
    assert torch.equal(with_term, without)
    assert bool(with_term.isfinite().all())


def test_value_pretraining_freezes_the_policy_and_not_the_critic() -> None:
    close(value_pretraining(row(1.0, 2.0), torch.tensor([[True, False]]), 49), 0.0)
    close(value_pretraining(row(1.0, 2.0), torch.tensor([[True, False]]), 50), [[1.0, 0.0]])
    rollouts, signals = synthetic_batch()
    algorithm = make("vapo", value_pretraining=2)
    for step, moves in ((0, False), (1, False), (2, True)):
        found = algorithm.coefficients(rollouts, signals, step=step)
        assert bool((found["logprobs"] != 0).any()) is moves
        assert bool((found["values"] != 0).any())
