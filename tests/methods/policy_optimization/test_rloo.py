"""RLOO: leave-one-out baseline; group of one; TRL's sequence ratio and KL in the reward."""

from __future__ import annotations

import math

import pytest
import torch

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
from tokenloom.methods.policy_optimization.dr_grpo import group_centered
from tokenloom.methods.policy_optimization.rloo import rloo


def groups(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


def test_defaults() -> None:
    assert defaults("rloo") == {"single": "zero"}
    assert preset_defaults("rloo") == {"dialect": "paper", "kl_coef": 0.0}


def test_worked_numbers() -> None:
    found = rloo(vector(1, 0, 0, 1), groups(0, 0, 0, 0), ones(4))
    close(found, [[2 / 3], [-2 / 3], [-2 / 3], [2 / 3]])
    # Two interleaved groups: (3, 0) and (1, 2, 6).
    found = rloo(vector(3, 1, 0, 2, 6), groups(5, 1, 5, 1, 1), ones(5))
    close(found.squeeze(-1), [3.0, -3.0, -3.0, -1.5, 4.5])


def test_a_group_sums_to_zero_and_scales_the_centered_reward() -> None:
    rollouts, _ = synthetic_batch()
    assert rollouts.rewards is not None
    one = ones(len(rollouts))
    found, centered = (
        rloo(rollouts.rewards, rollouts.group_ids, one),
        group_centered(rollouts.rewards, rollouts.group_ids, one),
    )
    for group, scored in ((4, 5), (9, 3), (2, 3)):
        rows = rollouts.group_ids == group
        close(found[rows].sum(), 0.0)
        close(found[rows], centered[rows] * scored / (scored - 1))


@pytest.mark.parametrize(("single", "alone"), [("zero", 0.0), ("reward", 0.7)])
def test_group_of_one(single: str, alone: float) -> None:
    found = rloo(vector(0.7, 1, 1), groups(3, 8, 8), ones(3), single=single)  # type: ignore[arg-type]  # parametrized
    # The constant group of two has a baseline: its zeros do not depend on `single`.
    close(found, [[alone], [0.0], [0.0]])


@pytest.mark.parametrize(("single", "alone"), [("zero", 0.0), ("reward", 0.7)])
def test_unscorable_rows_leave_the_baseline(single: str, alone: float) -> None:
    found = rloo(vector(1, NAN, 0, 0), groups(0, 0, 0, 0), ones(4), single=single)  # type: ignore[arg-type]
    close(found, [[1.0], [0.0], [-0.5], [-0.5]])
    found = rloo(vector(0.7, NAN), groups(0, 0), ones(2), single=single)  # type: ignore[arg-type]  # parametrized
    close(found, [[alone], [0.0]])
    close(rloo(vector(NAN, NAN), groups(0, 0), ones(2), single=single), 0.0)  # type: ignore[arg-type]


def test_constant_groups_are_exactly_zero_in_float32() -> None:
    assert bool((rloo(torch.full((7,), 0.1), groups(*[0] * 7), ones(7)) == 0).all())


def test_paper_gradient_sums_tokens_and_averages_rows() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 0, 0]])
    close(coefficients_of(make("rloo"), rollouts), [[0.5, 0.5, 0.5], [-0.5, 0.0, 0.0]])


def test_trl_clips_the_product_of_the_token_ratios() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 1]])
    inside, outside = [[0.1, 0.05], [-0.1, -0.05]], [[0.1, 0.15], [-0.1, -0.15]]
    found = coefficients_of(make("rloo", dialect="trl"), rollouts, signals_of(rollouts, torch.tensor(inside)))
    close(found, [[math.exp(0.15) / 2] * 2, [-math.exp(-0.15) / 2] * 2])
    # e^0.25 > 1.2 with A > 0 and e^-0.25 < 0.8 with A < 0: the whole rows are clipped.
    close(coefficients_of(make("rloo", dialect="trl"), rollouts, signals_of(rollouts, torch.tensor(outside))), 0.0)


@pytest.mark.parametrize("dialect", ["paper", "trl"])
def test_kl_is_subtracted_from_the_reward(dialect: str) -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]])
    ref = torch.tensor([[-1.5, -2.0], [-1.0, 9.0]], dtype=torch.float64)
    signals = signals_of(rollouts, ref_logprobs=ref)
    # Row 0 pays 0.1 * (0.5 + 1.0), row 1 nothing: rewards 0.85 and 0.
    found = advantages_of(make("rloo", dialect=dialect, kl_coef=0.1), rollouts, signals)
    close(found, [[0.85, 0.85], [-0.85, 0.0]])
