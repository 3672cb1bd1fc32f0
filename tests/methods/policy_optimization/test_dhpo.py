"""DHPO: token and sequence ratios, clipped apart and mixed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
    NAN,
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
    synthetic_batch,
)
from tokenloom.composition import bind
from tokenloom.context import Context
from tokenloom.methods.policy_optimization.dhpo import dhpo, entropy_guided, entropy_share
from tokenloom.methods.policy_optimization.gspo_token import gspo_token
from tokenloom.methods.policy_optimization.ppo_clip import ppo_clip

WIDE = {"low": 0.2, "high": 0.28}


def slopes(log_ratio: Tensor, advantage: float, **settings: float | bool) -> Tensor:
    """d objective / d log-ratio / A of one row."""
    a = torch.full_like(log_ratio, advantage)
    return gradient(lambda x: dhpo(x, a, ones(*x.shape), **settings), log_ratio)[0] / advantage


def test_defaults() -> None:
    shared = {"low": 3e-4, "high": 4e-4, "joint": False}
    assert defaults("dhpo") == {"weight": 0.5, **shared}
    assert defaults("dhpo/entropy") == shared
    assert preset_defaults("dhpo") == {"mixing": "average", "joint": False}
    algorithm = make("dhpo", mixing="entropy", joint=True)
    assert (algorithm.surrogate.part.name, algorithm.surrogate.params) == ("dhpo/entropy", {"joint": True})
    assert algorithm.bounds.params == {"low": 0.2, "high": 0.28}
    assert (algorithm.aggregate.part.name, algorithm.terms) == ("sequence-mean", ())


@pytest.mark.parametrize("joint", [False, True])
def test_all_weight_on_tokens_is_the_clip_of_grpo(joint: bool) -> None:
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    log_ratio, advantages = 3 * (signals.logprobs + 1), signals.logprobs + 0.7
    found = dhpo(log_ratio, advantages, rollouts.mask, 0.8, 1.28, weight=1.0, joint=joint)
    close(found, ppo_clip(log_ratio, advantages, rollouts.mask, 0.8, 1.28))
    algorithm = make("dhpo", joint=joint).override(surrogate={"weight": 1.0})
    plain = make("grpo", kl_coef=0.0).override(bounds={"high": 0.28})
    close(coefficients_of(algorithm, rollouts, signals), coefficients_of(plain, rollouts, signals))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("width", [3e-4, 0.1])
def test_all_weight_on_rows_is_gspo_token(joint: bool, width: float) -> None:
    rollouts, signals = synthetic_batch()
    rows = {"weight": 0.0, "low": width, "high": width}
    algorithm = make("dhpo", joint=joint).override(surrogate=rows)
    for slug in ("gspo-token", "gspo"):
        other = coefficients_of(make(slug, low=width, high=width), rollouts, signals)
        close(coefficients_of(algorithm, rollouts, signals), other)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("joint", [False, True])
def test_on_policy_gradient_is_the_advantage(weight: float, joint: bool) -> None:
    for advantage in (1.7, -0.4):
        close(slopes(row(0, 0, 0), advantage, weight=weight, joint=joint), 1.0)
    rollouts, signals = synthetic_batch()
    same = signals.replace(old_logprobs=signals.logprobs)
    plain = coefficients_of(make("grpo", kl_coef=0.0), rollouts, same)
    for mixing in ("average", "entropy"):
        close(coefficients_of(make("dhpo", mixing=mixing, joint=joint), rollouts, same), plain)


def test_objective_is_the_mixture_of_the_parents() -> None:
    log_ratio, mask = row(0.4, -0.5, 0.13), ones(1, 3)
    for advantage in (1.0, -1.0):
        a = row(*[advantage] * 3)
        token = ppo_clip(log_ratio, a, mask, 0.8, 1.28)
        rows = ppo_clip(gspo_token(log_ratio, row(0, 0, 0), mask), a, mask, 1 - 3e-4, 1 + 4e-4)
        close(dhpo(log_ratio, a, mask, weight=0.3), 0.3 * token + 0.7 * rows)


def test_an_outlier_loses_its_token_branch_and_keeps_the_rows() -> None:
    # One token at ratio e, three that bring the row's mean back to 0: the sequence branch stays inside.
    log_ratio = row(1.0, -1 / 3, -1 / 3, -1 / 3)
    found = slopes(log_ratio, 1.0)
    close(found[0, 0], 0.5)
    close(found[0, 1:], 0.5 * math.exp(-1 / 3) + 0.5)
    close(slopes(log_ratio, 1.0, weight=1.0)[0, 0], 0.0)


def test_a_row_outside_loses_its_sequence_branch_and_keeps_the_tokens() -> None:
    found = slopes(row(0.05, 0.05), 1.0)
    close(found, 0.5 * math.exp(0.05))
    found = slopes(row(0.05, 0.05), -1.0)
    close(found, math.exp(0.05))


def test_joint_minimum_agrees_when_both_branches_are_on_one_side() -> None:
    for log_ratio in (row(0.001, 0.0, -0.0008), row(1.0, 1.0), row(-1.0, -0.9)):
        for advantage in (1.0, -1.0):
            a, mask = torch.full_like(log_ratio, advantage), ones(*log_ratio.shape)
            close(dhpo(log_ratio, a, mask), dhpo(log_ratio, a, mask, joint=True))
            close(slopes(log_ratio, advantage), slopes(log_ratio, advantage, joint=True))


def test_joint_minimum_lets_one_branch_make_up_for_the_other() -> None:
    # Token 1 is far above its interval, the row slightly below: the mixture is above, so the row's pull is lost too.
    log_ratio = row(1.0, -1.2)
    apart, joint = slopes(log_ratio, 1.0), slopes(log_ratio, 1.0, joint=True)
    close(apart[0, 0], 0.5 * math.exp(-0.1))
    close(joint[0, 0], 0.0)


def test_huge_ratios_stay_finite() -> None:
    log_ratio = torch.tensor([[90.0, -90.0, 3.0]])
    for advantage in (1.0, -1.0):
        for joint in (False, True):
            assert bool(slopes(log_ratio, advantage, joint=joint).isfinite().all())


def test_entropy_share() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [False] * 3, [True, False, True]])
    entropies = torch.tensor([[0.5, 2.0, INF], [0.0, 0.0, 0.0], [NAN] * 3, [0.5, 9.0, 0.125]])
    close(entropy_share(entropies, mask), [[0.25, 1.0, 0.0], [0.0] * 3, [0.0] * 3, [1.0, 0.0, 0.25]])
    assert entropy_share(torch.zeros(2, 0), ones(2, 0)).shape == (2, 0)


def test_uncertain_tokens_take_more_of_their_own_ratio() -> None:
    log_ratio, mask, entropies = row(0.1, 0.1, -0.2), ones(1, 3), row(2.0, 0.5, 0.0)
    found = gradient(lambda x: entropy_guided(x, row(1, 1, 1), entropies, mask, **WIDE), log_ratio)[0]
    ratio = log_ratio.exp()
    # The row's ratio is 1 and inside.
    close(found, torch.cat([ratio[:, :1], 0.25 * ratio[:, 1:2] + 0.75, row(1.0)], -1))


def test_entropy_gets_no_gradient() -> None:
    rollouts, signals = synthetic_batch()
    found = make("dhpo", mixing="entropy").coefficients(rollouts, signals)
    close(found["entropies"], 0.0)
    assert bool((found["logprobs"] != 0).any())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("widths", [{}, WIDE, {"low": 0.9, "high": 9.0}])
@pytest.mark.parametrize("name", ["dhpo", "dhpo/entropy"])
def test_multiplier_is_the_gradient_on_both_sides_of_every_edge(
    joint: bool, widths: dict[str, float], name: str
) -> None:
    g = torch.Generator().manual_seed(7)
    shape = (60, 4)
    leaf = (torch.randn(shape, generator=g, dtype=torch.float64) * 0.4).requires_grad_()
    a = torch.randn(shape, generator=g, dtype=torch.float64)
    values = {"logprobs": leaf, "log_ratio": leaf, "advantages": a, "lo": 0.8, "hi": 1.28}
    values["entropies"] = torch.rand(shape, generator=g, dtype=torch.float64)
    ctx = Context(values, torch.rand(shape, generator=g) < 0.8)
    bound = bind(name, "surrogate", joint=joint, **widths)
    (slope,) = torch.autograd.grad(ctx.call(bound).sum(), leaf)
    closed = ctx.multiplier(bound)
    assert closed is not None
    close(slope, torch.where(ctx.mask, closed * a, torch.zeros_like(a)))


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"weight": 1.1}, {"low": -1.0}, {"high": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        dhpo(row(0.0), row(1.0), ones(1), **wrong)


def test_mechanisms_show_on_the_batch() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 1, 0]])
    signals = signals_of(rollouts, torch.cat([row(0.3, -0.2, -0.1), row(0.1, -0.1, 0.0)]))
    signals = signals.replace(entropies=torch.cat([row(0.1, 2.0, 1.0), row(0.7, 0.2, 0.0)]))
    found = [
        coefficients_of(a, rollouts, signals)
        for a in (make("dhpo"), make("dhpo", mixing="entropy"), make("gspo-token"), make("grpo", kl_coef=0.0))
    ]
    for i in range(4):
        assert all(not torch.allclose(found[i], found[j]) for j in range(i))
