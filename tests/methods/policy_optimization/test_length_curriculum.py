"""Curriculum GRPO: a shrinking budget, a triangular length reward, three signals in one reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
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
from tokenloom.methods.policy_optimization.length_curriculum import (
    length_curriculum,
    length_reward,
    thinking_tokens,
    token_budget,
)

USED = vector(0, 50, 100, 150, 200, 300)


def test_defaults() -> None:
    expected = {
        "correct": 0.3, "length": 0.6, "format": 0.1, "budget": 256.0, "decay": 0.7, "every": 100, "shape": "triangle",
        "end_of_thinking": None,
    }  # fmt: skip
    assert defaults("length-curriculum") == expected
    assert preset_defaults("length-curriculum") == expected | {"kl_coef": 0.04}


def test_triangle_and_band() -> None:
    close(length_reward(USED, torch.tensor(100.0)), [0, 0.5, 1, 0.5, 0, 0])
    close(length_reward(USED, torch.tensor(100.0), "band"), [1, 1, 1, 0.5, 0, 0])


def test_budget_shrinks_to_the_papers_87() -> None:
    budgets = [token_budget(s) for s in range(0, 2000, 50)]
    assert budgets == sorted(budgets, reverse=True)
    assert [token_budget(s) for s in (0, 99, 100, 200, 300)] == [256, 256, 179, 125, 87]
    assert token_budget(10**6) == 1
    assert {token_budget(s, decay=1.0) for s in range(0, 1000, 100)} == {256}
    assert token_budget(200, budget=100) == 49  # 100 * 0.7 * 0.7 is a hair below 49


@pytest.mark.parametrize("wrong", [{"budget": 0.5}, {"decay": 0.0}, {"decay": 1.1}, {"every": 0}])
def test_impossible_budgets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a budget needs"):
        token_budget(0, **wrong)


def rewards_of(lengths: list[int], step: int = 0, answers: Any = None, prompts: Any = None, **rest: Any) -> Any:
    mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    outcomes = torch.ones(len(lengths), dtype=torch.float64)
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    return length_curriculum(outcomes, tokens, mask, step, answers, prompts, **rest)


def test_three_signals_worked_numbers() -> None:
    # B = 20: lengths 10, 20, 30, 40 earn .5, 1, .5, 0 of .6; an answer was found in three of them.
    found = rewards_of([10, 20, 30, 40], answers=("4", "7", None, ""), budget=20.0)
    close(found, [0.3 + 0.3 + 0.1, 0.3 + 0.6 + 0.1, 0.3 + 0.3, 0.3 + 0.1])
    close(rewards_of([10, 20, 30, 40], budget=20.0), [0.6, 0.9, 0.6, 0.3])
    # One decay later B = 14.
    close(rewards_of([7, 14, 21, 28], step=100, budget=20.0), [0.6, 0.9, 0.6, 0.3])


def test_rewards_stay_between_zero_and_the_sum_of_the_weights() -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 40, generator=g) > 0.4
    outcomes = torch.rand(50, generator=g).double()
    answers = tuple("x" if i % 2 else None for i in range(50))
    found = length_curriculum(outcomes, torch.zeros(50, 40).long(), mask, 250, answers, budget=60.0)
    assert bool(((found >= 0) & (found <= 1.0)).all())
    assert bool(length_curriculum(vector(NAN), torch.zeros(1, 1).long(), ones(1), 0).isnan().all())


def test_the_budget_that_stood_in_the_prompt_counts() -> None:
    prompts: tuple[dict[str, Any], ...] = ({"budget": 40}, {}, {"budget": 10})
    close(rewards_of([20, 20, 10], prompts=prompts, budget=20.0), [0.3 + 0.3, 0.9, 0.9])
    with pytest.raises(ValueError, match="at least one token, got 0"):
        rewards_of([1], prompts=({"budget": 0},))


def test_thinking_tokens_end_at_the_tag() -> None:
    tokens = torch.tensor([[1, 2, 9, 3, 9], [1, 2, 3, 4, 5], [9, 1, 2, 3, 4], [1, 9, 9, 2, 2]])
    mask = torch.tensor([[True] * 5, [True, True, False, True, False], [True] * 5, [True, False, True, True, True]])
    assert thinking_tokens(tokens, mask, 9).tolist() == [2, 3, 0, 1]
    assert thinking_tokens(tokens, mask, None).tolist() == [5, 3, 5, 4]


def test_only_the_outcome_is_grpo_up_to_scale() -> None:
    rollouts, signals = synthetic_batch()
    plain = make("grpo").override(advantage={"eps": 1e-15})  # the default 1e-6 would see the scale of 0.3
    scaled = make("length-curriculum", length=0.0, format=0.0).override(advantage={"eps": 1e-15})
    close(coefficients_of(scaled, rollouts, signals), coefficients_of(plain, rollouts, signals))


def test_a_linear_budget_is_a_schedule() -> None:
    rollouts = rollouts_of([1.0, 1.0], mask=[[1] * 10, [1] * 5 + [0] * 5])
    linear = {"schedule": "linear", "start": 20.0, "end": 10.0, "steps": 10}
    algorithm = make("length-curriculum", budget=linear, decay=1.0, kl_coef=0.0)
    for step, expected in ((0, [0.3 + 0.3, 0.3 + 0.15]), (10, [0.9, 0.6])):  # B = 20, then 10
        close(algorithm.plan(rollouts, signals_of(rollouts), step=step).values["rewards"], expected)


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("length-curriculum")
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(reward=None)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)
