"""GRPO: every framework's reading of the name, by hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    loss_of,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    vector,
)
from tokenloom.methods.policy_optimization.grpo import center, grpo, leave_one_out


def group(*ids: int) -> Tensor:
    return torch.tensor(ids)


def test_defaults() -> None:
    assert defaults("grpo") == {"eps": 1e-6, "std": "group", "single": "zero", "correction": 1}
    assert defaults("grpo/leave-one-out") == {"eps": 1e-6}
    assert preset_defaults("grpo") == {"dialect": "paper", "kl_coef": None}
    (term,) = make("grpo").terms
    assert (term.coef, term.part.params["estimator"]) == (0.04, "k3")
    assert make("grpo").aggregate.part.name == "sequence-mean"


def test_worked_numbers() -> None:
    rewards, ids = vector(1, 0, 0, 1), group(0, 0, 0, 0)
    close(grpo(rewards, ids, ones(4), eps=0.0).squeeze(-1), [0.8660254, -0.8660254, -0.8660254, 0.8660254], 1e-6)
    close(grpo(rewards, ids, ones(4), eps=0.0, correction=0).squeeze(-1), [1, -1, -1, 1])


@pytest.mark.parametrize("right", [1, 3, 7])
def test_binary_rewards_give_the_odds_of_the_success_rate(right: int) -> None:
    p = right / 8
    rewards = vector(*[1.0] * right, *[0.0] * (8 - right))
    found = grpo(rewards, group(*[0] * 8), ones(8), eps=0.0, correction=0).squeeze(-1)
    close(found, [math.sqrt((1 - p) / p)] * right + [-math.sqrt(p / (1 - p))] * (8 - right))


@pytest.mark.parametrize(
    ("dialect", "right", "wrong"),
    [
        ("paper", 0.75 / 0.500001, -0.25 / 0.500001),
        ("trl", 1.4997001, -0.4999000),
        ("verl", 1.4999970, -0.4999990),
        ("openrlhf", 1.5, -0.5),
        ("nemo-rl", 1.0, -0.5773493),
        ("prime-rl", 0.75, -0.25),
    ],
)
def test_dialects_of_the_advantage(dialect: str, right: float, wrong: float) -> None:
    found = advantages_of(make("grpo", dialect=dialect), rollouts_of([1.0, 0.0, 0.0, 0.0]), kl(ref=0.0))
    close(found.squeeze(-1), [right, wrong, wrong, wrong], 1e-7)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("group", [0.7070068, -0.7070068, 0.7070568, -0.7070568]),
        ("batch", [0.5 / 0.9575271, -0.5 / 0.9575271, 1 / 0.9575271, -1 / 0.9575271]),
        ("none", [0.5, -0.5, 1.0, -1.0]),
    ],
)
def test_scale_rewards_of_trl(std: Any, expected: list[float]) -> None:
    # Groups (1, 0) and (2, 0), interleaved; stds 0.70711 and 1.41421, of the batch sqrt(2.75 / 3) = 0.9574271.
    found = grpo(vector(1, 2, 0, 0), group(0, 1, 0, 1), ones(4), eps=1e-4, std=std).squeeze(-1)
    close(found[[0, 2, 1, 3]], expected, 1e-6)


def kl(ref: float, log_ratio: float = 0.0, rows: int = 4) -> Any:
    rollouts = rollouts_of([0.0] * rows)
    return signals_of(rollouts, log_ratio, ref_logprobs=torch.full((rows, 1), ref, dtype=torch.float64))


@pytest.mark.parametrize(("single", "alone"), [("zero", 0.0), ("reward", 0.7 / 1.000001)])
def test_group_of_one(single: Any, alone: float) -> None:
    found = grpo(vector(0.7, 1, 1), group(4, 1, 1), ones(3), single=single)
    close(found, [[alone], [0.0], [0.0]])
    close(grpo(vector(0.7, NAN), group(4, 4), ones(2), single=single), [[alone], [0.0]])


def test_a_single_row_is_not_divided_without_std() -> None:
    close(grpo(vector(0.7), group(0), ones(1), std="none", single="reward"), 0.7)


def test_verl_and_paper_differ_on_a_single_row() -> None:
    rollouts = rollouts_of([0.7])
    close(advantages_of(make("grpo", dialect="verl"), rollouts), 0.7, 1e-5)
    close(advantages_of(make("grpo", dialect="trl"), rollouts), 0.0)


@pytest.mark.parametrize("part", [grpo, leave_one_out])
def test_constant_groups_are_exactly_zero_in_float32(part: Any) -> None:
    found = part(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64), ones(7))
    assert bool((found == 0).all())


def test_unscorable_rows_leave_the_statistics() -> None:
    with_nan = grpo(vector(1, NAN, 0, 0, 0), group(0, 0, 0, 0, 0), ones(5)).squeeze(-1)
    close(with_nan[[0, 2, 3, 4]], grpo(vector(1, 0, 0, 0), group(0, 0, 0, 0), ones(4)).squeeze(-1))
    assert with_nan[1].item() == 0
    close(center(vector(NAN, NAN), group(0, 0)), 0.0)
    batch = grpo(vector(1, NAN, 0, 0), group(0, 0, 1, 1), ones(4), std="batch")
    close(batch, 0.0)  # a lone scorable row and a constant group


def test_leave_one_out_statistics() -> None:
    # Row 2 of (0, 1, 3, 4): others 0, 1, 4 have mean 5/3 and Bessel variance 13/3.
    found = leave_one_out(vector(0, 1, 3, 4), group(0, 0, 0, 0), ones(4), eps=0.0).squeeze(-1)
    close(found[2], (3 - 5 / 3) / math.sqrt(13 / 3))
    # Two rows: the other one alone has no std, so the difference is not divided.
    close(leave_one_out(vector(0.2, 1.0), group(0, 0), ones(2)).squeeze(-1), [-0.8, 0.8])
    close(leave_one_out(vector(0.2, NAN, 5.0), group(0, 0, 1), ones(3)), 0.0)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("paper", [[1 / 6] * 3, [1 / 2, 0, 0]]),
        ("trl", [[0.25] * 3, [0.25, 0, 0]]),
        ("verl", [[0.25] * 3, [0.25, 0, 0]]),
    ],
)
def test_dialects_of_the_aggregation(dialect: str, expected: list[list[float]]) -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 0, 0]])
    plan = make("grpo", dialect=dialect, kl_coef=0.0).plan(rollouts, signals_of(rollouts))
    close(plan.values["scale"], expected)


@pytest.mark.parametrize("dialect", ["paper", "verl", "trl", "openrlhf", "nemo-rl", "prime-rl"])
def test_dialects_of_the_clip(dialect: str) -> None:
    # A < 0: ratio 2 keeps its gradient everywhere, ratio 5 under verl's cap of 3 does not.
    rollouts = rollouts_of([2.0, 0.0, 0.0])
    signals = signals_of(rollouts, vector(0.0, math.log(2), math.log(5))[:, None])
    algorithm = make("grpo", dialect=dialect, kl_coef=0.0)
    found = coefficients_of(algorithm, rollouts, signals).squeeze(-1)
    advantage = advantages_of(algorithm, rollouts, signals).squeeze(-1)
    close(found[1], 2 * advantage[1] / 3)
    close(found[2], 0.0 if dialect == "verl" else 5 * advantage[2] / 3)


@pytest.mark.parametrize(
    ("dialect", "ref", "log_ratio", "slope"),
    [
        ("paper", -1.5, math.log(2), 1 - math.exp(-0.5)),
        ("trl", -1.5, math.log(2), 1.0),  # r k3 + r (1 - e^x) = -r x = 2 * 0.5
        ("trl", -1.5, 0.0, 0.5),
        ("verl", -1.5, math.log(2), 1 - math.exp(-0.5)),
        ("paper", 2.0, 0.0, 1 - math.exp(3)),
        ("verl", 2.0, 0.0, 0.0),  # k3 = e^3 - 4 = 16.1 is beyond verl's 10
        ("verl", 1.0, 0.0, 1 - math.exp(2)),  # k3 = e^2 - 3 = 4.4 is not
        ("openrlhf", 2.0, 0.0, 1 - math.exp(3)),
    ],
)
def test_dialects_of_the_kl(dialect: str, ref: float, log_ratio: float, slope: float) -> None:
    # Equal rewards leave the KL alone; four tokens share the mean.
    rollouts = rollouts_of([0.0] * 4)
    found = coefficients_of(make("grpo", dialect=dialect, kl_coef=0.1), rollouts, kl(ref, log_ratio))
    close(found, -0.1 * slope / 4)


@pytest.mark.parametrize(("dialect", "terms"), [("paper", 1), ("verl", 0), ("trl", 0), ("prime-rl", 0)])
def test_kl_is_off_outside_the_paper(dialect: str, terms: int) -> None:
    assert len(make("grpo", dialect=dialect).terms) == terms
    assert len(make("grpo", dialect=dialect, kl_coef=0.0).terms) == 0
    assert len(make("grpo", dialect=dialect, kl_coef=0.001).terms) == 1


def test_loss_worked_by_hand() -> None:
    # Rewards 1, 0: A = +-0.70711. Ratio e^0.1 on row 0, 1 on row 1; k3(-1, -1.5) = 0.106531 on every token.
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]])
    ref = torch.full((2, 2), -1.5, dtype=torch.float64)
    signals = signals_of(rollouts, [[0.1, 0.1], [0.0, 0.0]], ref_logprobs=ref)
    expected = -0.5 * 0.7071058 * (1.1051709 - 1.0) + 0.04 * 0.1065307
    close(loss_of(make("grpo"), rollouts, signals), expected, 1e-7)
