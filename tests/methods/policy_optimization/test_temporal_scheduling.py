"""Temporal scheduling: the curves, and three things that they drive."""

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
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.temporal_scheduling import (
    Curve,
    entropy_advantage,
    forking,
    magnitude,
    trajectory,
)
from tokenloom.methods.policy_optimization.top_tokens import counted_up

SCHEDULE = {"curve": "linear", "start": 0.99, "begin": 0.0, "end": 0.8}
WHERE = ["trajectory", "forking", "entropy-advantage"]


def test_defaults() -> None:
    assert defaults("temporal-scheduling/trajectory") == SCHEDULE
    assert defaults("temporal-scheduling/forking") == SCHEDULE
    assert defaults("temporal-scheduling/entropy-advantage") == {"alpha": 0.4, "kappa": 2.0, **SCHEDULE}
    assert preset_defaults("temporal-scheduling") == {"where": "trajectory", **SCHEDULE}
    algorithm = make("temporal-scheduling")
    assert algorithm.bounds.params == {"low": 0.2, "high": 0.28}
    assert algorithm.terms == ()


# -- rho


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("linear", [0.99, 0.7425, 0.495, 0.0, 0.0]),
        ("sigmoid", [0.99, 0.8861, 0.495, 0.0, 0.0]),
        ("gamma", [0.9801, 0.5513, 0.2450, 0.0, 0.0]),
    ],
)
def test_curves(curve: Curve, expected: list[float]) -> None:
    assert [magnitude(s, 100, curve) for s in (0, 20, 40, 80, 100)] == pytest.approx(expected, abs=5e-5)
    falling = [magnitude(s, 100, curve) for s in range(101)]
    assert falling == sorted(falling, reverse=True)


def test_begin_and_end_move_the_ramp() -> None:
    assert [magnitude(s, 10, begin=0.2, end=0.6) for s in (0, 2, 4, 6)] == pytest.approx([0.99, 0.99, 0.495, 0.0])


@pytest.mark.parametrize("curve", ["linear", "sigmoid"])
def test_a_run_without_an_end_stays_at_the_beginning(curve: Curve) -> None:
    assert magnitude(10**6, None, curve) == pytest.approx(0.99)


@pytest.mark.parametrize("wrong", [{"start": 1.5}, {"begin": 0.8}, {"begin": -0.1}])
def test_impossible_schedules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a schedule needs"):
        magnitude(0, 10, **wrong)  # type: ignore[arg-type]


# -- 1 trajectory


@pytest.mark.parametrize(
    ("step", "trained"), [(0, 1), (20, 3), (40, 6), (60, 8), (80, 10), (100, 10)]
)  # rho .99, .7425, .495, .2475, 0, 0 of ten tokens
def test_the_tail_grows_to_the_whole_response(step: int, trained: int) -> None:
    found = trajectory(torch.zeros(1, 10), ones(1, 10), step, 100)
    assert found.tolist() == [[0] * (10 - trained) + [1] * trained]


def test_one_token_is_always_trained() -> None:
    mask = torch.tensor([[True, False, True, True], [True, False, False, False], [False] * 4])
    close(trajectory(torch.zeros(3, 4), mask, 0, 100), [[0, 0, 0, 1], [1, 0, 0, 0], [0] * 4])
    close(trajectory(torch.zeros(3, 4), mask, 0, 100, start=1.0), [[0, 0, 0, 1], [1, 0, 0, 0], [0] * 4])


# -- 2 forking tokens


def test_forking_keeps_the_highest_entropies() -> None:
    entropies = torch.tensor([[0.3, 5.0, 0.1, 2.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    for step, kept in ((0, [0, 1, 0, 0, 0]), (40, [1, 1, 0, 1, 0]), (80, [1, 1, 1, 1, 0])):  # 1 %, 50.5 %, all of four
        assert forking(entropies, mask, step, 100).tolist() == [kept]


@pytest.mark.parametrize(
    ("rho", "length", "kept"), [(0.99, 100, 1), (0.99, 101, 2), (0.7, 10, 3), (0.0, 7, 7), (1.0, 7, 1)]
)
def test_number_of_forking_tokens(rho: float, length: int, kept: int) -> None:
    # 1 - 0.99 is a hair above 0.01: without a tolerance 100 tokens would keep 2.
    assert counted_up(1 - rho, ones(1, length)).tolist() == [kept]


def test_equal_entropies_keep_the_first_tokens() -> None:
    assert forking(torch.ones(1, 4), ones(1, 4), 40, 100, start=1.0).tolist() == [[1, 1, 0, 0]]


# -- 3 entropy-shaped advantage


def test_bonus_worked_numbers() -> None:
    # rho .495 at step 40: min(.4 H, |A| / 2).
    found = entropy_advantage(row(1.0, 1.0, -1.0, 0.0), row(1.0, 9.0, 0.5, 9.0), ones(1, 4), 40, 100)
    close(found, [[1 + 0.495 * 0.4, 1 + 0.495 * 0.5, -1 + 0.495 * 0.2, 0.0]])


@pytest.mark.parametrize("kappa", [1.01, 2.0, 10.0])
def test_bonus_raises_without_turning_the_sign(kappa: float) -> None:
    g = torch.Generator().manual_seed(0)
    a, h = torch.randn(4, 6, generator=g).double(), 5 * torch.rand(4, 6, generator=g).double()
    found = entropy_advantage(a, h, ones(4, 6), 0, 100, kappa=kappa)
    assert bool((found > a).all())
    assert torch.equal(found.sign(), a.sign())


def test_impossible_kappa_is_refused() -> None:
    with pytest.raises(ValueError, match="kappa must be positive"):
        entropy_advantage(row(1.0), row(1.0), ones(1), 0, 10, kappa=0.0)


# -- the whole


def base() -> Any:
    return make("grpo", kl_coef=0.0).override(bounds={"low": 0.2, "high": 0.28}, aggregate="token-mean")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("curve", ["linear", "sigmoid", "gamma"])
def test_at_rho_zero_it_is_the_base(where: str, curve: str) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("temporal-scheduling", where=where, curve=curve)
    found = coefficients_of(algorithm, rollouts, signals, step=80, total_steps=100)
    close(found, coefficients_of(base(), rollouts, signals))
    early = coefficients_of(algorithm, rollouts, signals, step=0, total_steps=100)
    assert not torch.allclose(early, found, rtol=1e-6, atol=1e-9)


def test_context_leaves_the_normalizer() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1, 1], [1, 1, 0, 0]])
    algorithm = make("temporal-scheduling")
    a = float(advantages_of(algorithm, rollouts)[0, 0])
    found = coefficients_of(algorithm, rollouts, signals_of(rollouts), step=40, total_steps=100)  # rho .495: 1 and 0
    close(found, torch.tensor([[0, a, a, a], [-a, -a, 0, 0]]).double() / 5, 1e-6)
