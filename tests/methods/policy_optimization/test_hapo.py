"""HAPO: the sheet's worked numbers, the fallback, and the limit in which nothing adapts."""

from __future__ import annotations

import math

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
    row,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.grpo import grpo
from tokenloom.methods.policy_optimization.hapo import (
    adaptive_bounds,
    adaptive_temperature,
    entropy_scale,
    normalized,
    redistribute,
    token_average,
)

ENTROPIES = torch.tensor([[-4.0, -2.0, -1.0, 0.0, 1.0]], dtype=torch.float64).exp()
H = row(-1, -0.5, -0.25, 0, 1)


def test_defaults() -> None:
    assert defaults("hapo") == {"rho": 0.8, "eps": 1e-6, "limit": 5.0}
    assert defaults("hapo/bounds") == {"low": 0.2, "high": 0.2, "cap": 10.0, "alpha": 1.0}
    assert preset_defaults("hapo") == {"rho": 0.8, "tau": 0.05, "alpha": 1.0, "beta": 1.0}


def test_normalized_entropies_worked_by_hand() -> None:
    scale = entropy_scale(ENTROPIES, ones(1, 5), 0.8)
    # round(0.8 * 4) = 3, the fourth smallest: ln H = 0.
    assert scale == pytest.approx({"pivot": 0.0, "above": 1.0, "below": 4.0})
    assert scale is not None
    close(normalized(ENTROPIES, scale), H)
    assert entropy_scale(ENTROPIES, ~ones(1, 5), 0.8) is None


def test_constant_and_zero_entropies_are_neutral() -> None:
    for value in (0.7, 0.0):
        constant = torch.full((2, 3), value)
        scale = entropy_scale(constant, ones(2, 3), 0.8)
        assert scale is not None
        assert normalized(constant, scale).tolist() == [[0.0] * 3] * 2


def test_bounds_worked_by_hand() -> None:
    lo, hi, cap = adaptive_bounds(H)
    close(lo, 1 - row(0.4, 0.3, 0.25, 0.2, 0.2))
    close(hi, 1 + row(0.2, 0.2, 0.2, 0.2, 0.4))
    assert cap == 10.0
    with pytest.raises(ValueError, match="low"):
        adaptive_bounds(H, low=0.8)


def lengths(*numbers: int) -> torch.Tensor:
    return torch.arange(max(numbers))[None] < torch.tensor(numbers)[:, None]


def average(rewards: torch.Tensor, mask: torch.Tensor, **rest: float) -> torch.Tensor:
    group = torch.zeros(len(rewards), dtype=torch.int64)
    found, _ = token_average(rewards, group, mask, torch.ones(mask.shape).double(), None, **rest)
    return found["advantages"]


def test_token_average_worked_by_hand() -> None:
    mask = lengths(2, 4, 2)
    found = average(vector(1, 0, 0), mask, eps=0.0)
    close(found[:, 0], vector(1.732051, -0.577350, -0.577350), 1e-6)
    close(found.sum(), 0.0)
    # Equal lengths: population std over rows.
    close(average(vector(1, 0, 0), lengths(3, 3, 3), eps=0.0)[:, 0], vector(math.sqrt(2), *[-1 / math.sqrt(2)] * 2))


def test_an_extreme_group_takes_grpos_advantage() -> None:
    # One right answer of one token against 30 wrong tokens: A = sqrt(30) > 5.
    rewards, mask = vector(1, 0), lengths(1, 30)
    group = torch.zeros(2, dtype=torch.int64)
    close(average(rewards, mask), grpo(rewards, group, mask))
    close(average(rewards, mask, limit=6.0, eps=0.0)[0, 0], math.sqrt(30))
    # 24 wrong tokens: sqrt(24) < 5, whatever padding there is.
    close(average(rewards, lengths(1, 24), eps=0.0)[0, 0], math.sqrt(24))


def test_unscored_and_constant_rows_get_nothing() -> None:
    found = average(vector(1, 0, NAN), lengths(2, 2, 9))
    close(found[:2, 0], vector(1, -1), 1e-5)
    assert bool((found[2] == 0).all())
    assert bool((average(torch.full((3,), 0.1), lengths(1, 2, 3)) == 0).all())


def test_redistribution_inside_and_outside_the_neutral_zone() -> None:
    h = row(0.5, 0.5, -0.5, -0.5)
    ratio = row(1.0, 1.15, 1.0, 1.15)  # the zone is (0.9, 1.1)
    found = redistribute(row(2, 2, 2, 2), h, ratio, ones(1, 4))
    close(found, row(2, 3, 1, 2))


def test_temperature_follows_the_entropy() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert adaptive_temperature(logits, None) is logits
    law = logits.softmax(-1)
    entropies = -(law * law.log()).sum(-1)
    scale = {"pivot": float(entropies[0].log()), "above": 1e9, "below": 1.0}
    found = adaptive_temperature(logits, scale, tau=0.5)
    torch.testing.assert_close(found[0], logits[0])
    scale = {"pivot": float(entropies.log().mean()), "above": 1e-9, "below": 1e-9}
    found = adaptive_temperature(logits, scale, tau=0.5)
    torch.testing.assert_close(found[0], logits[0] / 0.5)  # certain: cooler, clamped to h = -1
    infinite = torch.tensor([[0.0, float("-inf")]])
    assert not bool(adaptive_temperature(infinite, scale).isnan().any())


def test_the_scale_reaches_the_next_steps_sampling() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("hapo", tau=0.5)
    shape = algorithm.shape_logits(state=algorithm.plan(rollouts, signals).state)
    assert shape is not None
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    assert float((shape(logits) / logits)[0, 0]) > 1.5


def test_without_adaptation_it_is_dapo_with_the_token_average() -> None:
    rollouts, signals = synthetic_batch()
    still = make("hapo", tau=0.0, alpha=0.0, beta=0.0)
    dapo = make("dapo", dialect="verl").override(advantage="hapo", bounds={"high": 0.2})
    close(coefficients_of(still, rollouts, signals), coefficients_of(dapo, rollouts, signals))


def test_each_part_shows() -> None:
    rollouts, signals = synthetic_batch()
    found = coefficients_of(make("hapo"), rollouts, signals)
    for without in ({"credit": None}, {"bounds": {"alpha": 0.0}}):
        other = coefficients_of(make("hapo").override(**without), rollouts, signals)
        assert not torch.allclose(found, other, rtol=1e-6, atol=1e-9)
