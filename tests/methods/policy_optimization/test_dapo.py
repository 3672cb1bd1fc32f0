"""DAPO: each of its four parts by itself, then together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    preset_defaults,
    rollouts_of,
    signals_of,
    vector,
)
from tokenloom.batch import Sampling
from tokenloom.methods.policy_optimization.dapo import dynamic_sampling, overlong_filter, overlong_penalty

BARE: dict[str, Any] = {"dynamic_sampling": False, "overlong": "none"}


def test_defaults() -> None:
    assert defaults("dapo/overlong-penalty") == {"length": None, "cache": 0.2, "factor": 1.0}
    assert preset_defaults("dapo") == {
        "dynamic_sampling": True,
        "overlong": "penalty",
        "low": 0.2,
        "high": 0.28,
        "dialect": "paper",
    }
    algorithm = make("dapo")
    assert algorithm.terms == ()  # no KL
    assert algorithm.refill


# -- clip-higher and token mean


def test_clip_higher() -> None:
    # A > 0 survives a ratio of 1.25 (within 1.28) and not of 1.3; A < 0 is cut below 0.8.
    rollouts = rollouts_of([1.0, 1.0, 0.0, 0.0])
    signals = signals_of(rollouts, vector(1.25, 1.3, 0.79, 0.81).log()[:, None])
    found = coefficients_of(make("dapo", **BARE), rollouts, signals).squeeze(-1)
    a = 0.8660239
    close(found, [a * 1.25 / 4, 0.0, 0.0, -a * 0.81 / 4], 1e-6)


def test_token_mean_does_not_see_rows() -> None:
    apart = rollouts_of([1.0, 0.0, 0.0], mask=[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    joined = rollouts_of([1.0, 0.0], mask=[[1, 1, 1, 1], [1, 1, 1, 1]])
    for rollouts in (apart, joined):
        scale = make("dapo", **BARE).plan(rollouts, signals_of(rollouts)).values["scale"]
        close(scale[rollouts.mask], 1 / 8)


# -- dynamic sampling


def test_dynamic_sampling_drops_groups_without_a_difference() -> None:
    outcomes = vector(1, 1, 0, 0, 1, 0, 0.5, NAN, NAN, 1)
    ids = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4, 5, 3])
    expected = [False, False, False, False, True, True, False, False, False, True]
    assert dynamic_sampling(outcomes, ids).tolist() == expected


def test_a_constant_group_never_enters_the_update() -> None:
    rollouts = rollouts_of([1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1])
    algorithm = make("dapo")
    assert algorithm.keep(rollouts).tolist() == [False, False, True, True]
    (update,) = algorithm.plan(rollouts, signals_of(rollouts)).updates
    assert update.rows.tolist() == [2, 3]
    close(update.tensors["scale"], 0.5)


def test_dynamic_sampling_judges_the_outcome_not_the_penalty() -> None:
    # Equal outcomes, different lengths: the penalty tells the rows apart, the verifier did not.
    rollouts = rollouts_of([1.0, 1.0], mask=[[1] * 10, [1] * 5 + [0] * 5])
    assert not bool(make("dapo").plan(rollouts, signals_of(rollouts)).values["keep"].any())
    off = make("dapo", dynamic_sampling=False).plan(rollouts, signals_of(rollouts))
    assert off.values["advantages"].abs().sum() > 0


# -- overlong responses


def test_penalty_worked_numbers() -> None:
    lengths = torch.tensor([10, 80, 90, 95, 100, 130])
    found = overlong_penalty(torch.ones(6, dtype=torch.float64), lengths, 100, cache=20)
    close(found, [1.0, 1.0, 0.5, 0.25, 0.0, 0.0], 1e-6)
    close(overlong_penalty(torch.zeros(6).double(), lengths, length=100, factor=2.0), [0, 0, -1, -1.5, -2, -2], 1e-6)


def test_penalty_of_the_paper_is_a_fifth_of_the_longest_response() -> None:
    lengths = torch.tensor([16384, 18432, 20480])
    close(overlong_penalty(torch.zeros(3), lengths, 20480), [0.0, -0.5, -1.0])
    close(overlong_penalty(torch.zeros(3), lengths, 20480, cache=4096), [0.0, -0.5, -1.0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"length": 10, "cache": 11}, "got 11"), ({"length": 9, "cache": 0}, "got 0")],
)
def test_impossible_penalties_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        overlong_penalty(torch.zeros(1), torch.ones(1), **arguments)


def test_nothing_is_overlong_where_no_limit_is_known() -> None:
    assert torch.equal(overlong_penalty(torch.tensor([1.0, 0.0]), torch.tensor([5, 10**6])), torch.tensor([1.0, 0.0]))


def test_penalty_enters_the_advantage() -> None:
    # L_max 10, cache 2: length 9 costs a half. Rewards 0.5, 0 instead of 1, 0: the std rescales, the sign stays.
    rollouts = rollouts_of(
        [1.0, 0.0, 0.0], mask=[[1] * 9, [1] * 3 + [0] * 6, [0] * 9], sampling=Sampling(max_tokens=10)
    )
    plan = make("dapo").plan(rollouts, signals_of(rollouts))
    close(plan.values["rewards"], [0.5, 0.0, 0.0], 1e-6)
    close(plan.values["outcomes"], [1.0, 0.0, 0.0])


def test_filter_drops_responses_cut_by_length() -> None:
    truncated = torch.tensor([True, False, False, False])
    assert overlong_filter(truncated).tolist() == [False, True, True, True]
    rollouts = rollouts_of([0.0, 1.0, 0.0, 0.0], truncated=truncated)
    found = coefficients_of(make("dapo", overlong="filter"), rollouts).squeeze(-1)
    # Its reward still counts in the group's mean and std, its token not in the normalizer.
    close(found, [0.0, 0.5, -1 / 6, -1 / 6], 1e-5)


# -- dialects


@pytest.mark.parametrize(("dialect", "right"), [("paper", 1.4999970), ("verl", 1.4999970), ("trl", 1.4997001)])
def test_epsilon_of_the_dialects(dialect: str, right: float) -> None:
    found = advantages_of(make("dapo", dialect=dialect), rollouts_of([1.0, 0.0, 0.0, 0.0]))
    close(found[0], right, 1e-7)


def test_trl_samples_statically_and_does_not_penalize() -> None:
    algorithm = make("dapo", dialect="trl")
    assert not algorithm.refill
    assert (algorithm.reward, algorithm.select) == ((), ())
    assert [b.part.name for b in make("dapo", dialect="trl", overlong="filter").select] == ["dapo/overlong-filter"]


def test_verl_caps_the_ratio_at_ten() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0])
    signals = signals_of(rollouts, vector(1.0, 9.0, 11.0).log()[:, None])
    found = coefficients_of(make("dapo", dialect="verl"), rollouts, signals).squeeze(-1)
    a = -1 / 3 / 0.5773513
    close(found[1:], [9 * a / 3, 0.0], 1e-6)
    close(coefficients_of(make("dapo"), rollouts, signals).squeeze(-1)[1:], [9 * a / 3, 11 * a / 3], 1e-6)
