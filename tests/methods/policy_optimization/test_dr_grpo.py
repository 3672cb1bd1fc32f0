"""Dr.GRPO: no std, a constant length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    vector,
)
from tokenloom.batch import Sampling
from tokenloom.methods.policy_optimization.dr_grpo import constant_length, group_centered
from tokenloom.methods.policy_optimization.rloo import rloo

MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_defaults() -> None:
    assert defaults("dr-grpo/center") == {}
    assert defaults("dr-grpo/constant-length") == {"length": None, "divisor": "rows", "rows": "live"}
    assert preset_defaults("dr-grpo") == {"dialect": "paper", "length": None}


def test_advantage_is_centered_and_a_share_of_rloo() -> None:
    rewards, ids = vector(1, 0, 0, 0, 3, 1), torch.tensor([0, 0, 0, 0, 1, 1])
    found = group_centered(rewards, ids, ones(6)).squeeze(-1)
    close(found, [0.75, -0.25, -0.25, -0.25, 1.0, -1.0])
    sizes = vector(4, 4, 4, 4, 2, 2)
    close(found, (sizes - 1) / sizes * rloo(rewards, ids, ones(6)).squeeze(-1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1 / 20),  # two live rows, max_tokens 10
        ({"rows": "all"}, 1 / 30),
        ({"length": 5}, 1 / 10),
        ({"divisor": "length"}, 1 / 10),
        ({"divisor": "one"}, 1 / 2),
    ],
)
def test_divisors(settings: dict[str, Any], expected: float) -> None:
    mask = torch.tensor(MASK, dtype=torch.bool)
    close(constant_length(mask, 10, **settings), mask * expected, 1e-7)


def test_without_a_known_length_the_padded_width_stands_in() -> None:
    close(constant_length(ones(2, 4)), 1 / 8)
    close(constant_length(torch.zeros(2, 0, dtype=torch.bool)), torch.zeros(2, 0))


@pytest.mark.parametrize(
    ("dialect", "share"), [("paper", 1 / 20), ("trl", 1 / 30), ("verl", 1 / 20), ("verl-old", 1 / 10)]
)
def test_dialects_of_the_scale(dialect: str, share: float) -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0], mask=MASK, sampling=Sampling(max_tokens=10))
    plan = make("dr-grpo", dialect=dialect).plan(rollouts, signals_of(rollouts))
    close(plan.values["scale"], rollouts.mask * share, 1e-7)


def test_length_is_verls_loss_scale_factor() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0], mask=MASK, sampling=Sampling(max_tokens=10))
    plan = make("dr-grpo", dialect="verl", length=4).plan(rollouts, signals_of(rollouts))
    close(plan.values["scale"], rollouts.mask / 8, 1e-7)


def test_padding_does_not_change_the_loss() -> None:
    narrow = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]], sampling=Sampling(max_tokens=7))
    wide = rollouts_of([1.0, 0.0], mask=[[1, 1, 0, 0], [1, 0, 0, 0]], sampling=Sampling(max_tokens=7))
    found = coefficients_of(make("dr-grpo"), narrow)
    close(coefficients_of(make("dr-grpo"), wide)[:, :2], found)
    close(found, [[0.5 / 14, 0.5 / 14], [-0.5 / 14, 0.0]], 1e-7)


def test_a_response_twice_as_long_weighs_twice_as_much() -> None:
    sampling = Sampling(max_tokens=8)
    short = rollouts_of([1.0, 0.0], mask=[[1, 1, 0, 0], [1, 0, 0, 0]], sampling=sampling)
    long = rollouts_of([1.0, 0.0], mask=[[1, 1, 1, 1], [1, 0, 0, 0]], sampling=sampling)
    one, two = (coefficients_of(make("dr-grpo"), r).abs().sum(-1) for r in (short, long))
    close(two[0], 2 * one[0])
    close(two[1], one[1])


def test_verl_dialects_clip_twice() -> None:
    # A = -0.5 at ratio 5 is beyond the cap of 3.
    rollouts = rollouts_of([1.0, 0.0])
    signals = signals_of(rollouts, [[0.0], [1.6094379]])
    assert coefficients_of(make("dr-grpo", dialect="verl"), rollouts, signals)[1].item() == 0
    close(coefficients_of(make("dr-grpo"), rollouts, signals)[1], -0.5 * 5 / 2, 1e-6)
