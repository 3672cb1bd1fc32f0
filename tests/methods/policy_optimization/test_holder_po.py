"""HölderPO: power means of token ratios, three places to clip, an annealed exponent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
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
from tokenloom.algorithm import Algorithm
from tokenloom.composition import bind
from tokenloom.context import Context
from tokenloom.methods.policy_optimization.gspo import gspo
from tokenloom.methods.policy_optimization.holder_po import holder_po, log_power_mean, token_clipped
from tokenloom.schedule import Schedule

RATIOS = row(0.5, 1.0, 2.0)
EXPONENTS = [-30.0, -2.0, -1.0, -1e-3, -1e-7, 0.0, 1e-7, 1e-5, 0.5, 1.0, 2.0, 3.0, 30.0]


def mean_of(ratios: Tensor, p: float, mask: Tensor | None = None) -> Tensor:
    m = ones(*ratios.shape) if mask is None else mask
    return log_power_mean(ratios.log(), m, p).exp()


def test_defaults() -> None:
    assert defaults("holder-po") == {"p": 1.0, "clip": None}
    assert defaults("holder-po/token") == {"p": 1.0}
    assert preset_defaults("holder-po") == {"variant": "sequence", "p": None, "clip": 0.2}
    algorithm = make("holder-po")
    assert algorithm.advantage.params == {"eps": 1e-8}
    assert algorithm.log_ratio.params == {"p": Schedule("linear", 2.0, -2.0, steps=500), "clip": None}
    assert algorithm.bounds.params == {"low": 0.2, "high": 0.2}
    assert (algorithm.aggregate.part.name, algorithm.terms) == ("sequence-mean", ())
    assert make("holder-po", variant="both").log_ratio.params["clip"] == 0.2
    token = make("holder-po", variant="token", p=0.5)
    assert token.log_ratio.part.name == "token-ratio"
    assert token.surrogate.params == {"p": 0.5}


@pytest.mark.parametrize(
    ("p", "mean"), [(1.0, 1.166667), (0.0, 1.0), (1e-7, 1.0), (-1.0, 0.857143), (2.0, 1.322876), (-2.0, 0.755929)]
)
def test_worked_numbers(p: float, mean: float) -> None:
    close(mean_of(RATIOS, p), mean, 1e-6)
    close(holder_po(RATIOS.log(), row(0, 0, 0), ones(1, 3), p=p).exp(), mean, 1e-6)


def test_never_falls_with_p_and_stays_between_the_extremes() -> None:
    ratios = torch.rand(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 0.01
    found = torch.cat([mean_of(ratios, p) for p in EXPONENTS], -1)
    assert bool((found.diff(dim=-1) >= -1e-12).all())
    assert bool((found >= ratios.amin(-1, keepdim=True) - 1e-12).all())
    assert bool((found <= ratios.amax(-1, keepdim=True) + 1e-12).all())


@pytest.mark.parametrize("p", [p for p in EXPONENTS if p != 0 and abs(p) >= 1e-6])
def test_gradient_weighs_by_the_power_of_the_ratio(p: float) -> None:
    found = gradient(lambda x: log_power_mean(x, ones(1, 3), p).exp(), RATIOS.log())[0]
    rho = mean_of(RATIOS, p)
    close(found, rho * RATIOS**p / (RATIOS**p).sum())
    close(found.sum(-1, keepdim=True), rho)


def test_positive_exponents_concentrate_on_what_rose() -> None:
    up, down = (gradient(lambda x, p=p: log_power_mean(x, ones(1, 3), p), RATIOS.log())[0] for p in (2.0, -2.0))
    assert up.argmax() == 2
    assert down.argmax() == 0
    close(up.flip(-1), down)


@pytest.mark.parametrize("p", EXPONENTS)
def test_on_policy_every_exponent_gives_one_and_equal_shares(p: float) -> None:
    logprobs = row(-0.3, -2.0, -7.0, -0.1)
    close(holder_po(logprobs, logprobs, ones(1, 4), p=p), 0.0)
    close(gradient(lambda x: holder_po(x, logprobs, ones(1, 4), p=p)[:, :1], logprobs)[0], 0.25)


def test_p_zero_is_the_ratio_of_gspo() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    arguments = (signals.logprobs, signals.old_logprobs, rollouts.mask)
    close(holder_po(*arguments, p=0.0), gspo(*arguments))
    found = coefficients_of(make("holder-po", p=0.0, clip=0.1), rollouts, signals)
    other = make("gspo", low=0.1, high=0.1).override(advantage={"eps": 1e-8})
    close(found, coefficients_of(other, rollouts, signals))


def test_p_one_without_a_clip_is_grpo_without_a_clip() -> None:
    rollouts, signals = synthetic_batch()
    found, plain = (
        coefficients_of(a.override(surrogate="importance"), rollouts, signals)
        for a in (make("holder-po", p=1.0), make("grpo", kl_coef=0.0).override(advantage={"eps": 1e-8}))
    )
    close(found, plain)


@pytest.mark.parametrize("variant", ["sequence", "token", "both"])
@pytest.mark.parametrize("p", [-2.0, 0.0, 1.0, 2.0])
def test_on_policy_is_grpo(variant: str, p: float) -> None:
    rollouts, signals = synthetic_batch()
    same = signals.replace(old_logprobs=signals.logprobs)
    plain = make("grpo", kl_coef=0.0).override(advantage={"eps": 1e-8})
    close(
        coefficients_of(make("holder-po", variant=variant, p=p), rollouts, same), coefficients_of(plain, rollouts, same)
    )


def test_only_sampled_tokens_count_and_empty_rows_are_silent() -> None:
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    logprobs = torch.tensor([[math.log(0.5), NAN, math.log(2.0), 99.0], [NAN] * 4], dtype=torch.float64)
    for p in (-2.0, 0.0, 1.0):
        found = holder_po(logprobs, torch.zeros(2, 4).double(), mask, p=p)
        close(found[0, [0, 2]], mean_of(row(0.5, 2.0), p).log().squeeze())
        assert bool((found[~mask] == 0).all())
        slope = gradient(lambda x, p=p: holder_po(x, torch.zeros(2, 4).double(), mask, p=p), logprobs)[0]
        assert bool(slope.isfinite().all())
        assert bool((slope[~mask] == 0).all())
    assert holder_po(torch.zeros(2, 0), torch.zeros(2, 0), ones(2, 0), p=2.0).shape == (2, 0)


def test_extreme_ratios_and_exponents_do_not_overflow() -> None:
    log_ratios = torch.tensor([[-18.0, 0.0, 18.0]])
    for p, mean in ((-60.0, -18.0), (60.0, 18.0)):
        # Of three terms one dominates: the mean is its ratio times 3^(-1/p).
        close(log_power_mean(log_ratios, ones(1, 3), p), mean - math.log(3) / p, 1e-6)
        slope = gradient(lambda x, p=p: log_power_mean(x, ones(1, 3), p), log_ratios)[0]
        close(slope.sum(), 1.0, 1e-6)


def test_exponents_near_zero_keep_their_digits_in_single_precision() -> None:
    log_ratios = torch.tensor([[0.11, -0.05, 0.02, 0.4, -0.31]])
    for p in (1e-5, -1e-4, 1e-3):
        exact = log_power_mean(log_ratios.double(), ones(1, 5), p)
        close(log_power_mean(log_ratios, ones(1, 5), p).double(), exact, 1e-6)


# -- clips


def test_sequence_clip() -> None:
    # A mean ratio of 1.1667 is inside, 1.3229 is not; A > 0 in row 0, A < 0 in row 1.
    rollouts = rollouts_of([1.0, 0.0], mask=[[1] * 3] * 2)
    signals = signals_of(rollouts, RATIOS.log())
    share = 0.5 / (math.sqrt(0.5) + 1e-8) / 2
    found = coefficients_of(make("holder-po", p=1.0), rollouts, signals)
    close(found, torch.cat([RATIOS, -RATIOS]) / 3 * share)
    found = coefficients_of(make("holder-po", p=2.0), rollouts, signals)
    close(found[0], 0.0)
    close(found[1], -share * math.sqrt(1.75) * RATIOS[0] ** 2 / 5.25)


def test_clip_both_clamps_the_tokens_first() -> None:
    width = math.log(1.2)
    log_ratios = row(-0.9, 0.1, 0.9)
    found = holder_po(log_ratios, row(0, 0, 0), ones(1, 3), p=1.0, clip=0.2)
    close(found.exp(), (math.exp(-width) + math.exp(0.1) + math.exp(width)) / 3)
    slope = gradient(lambda x: holder_po(x, row(0, 0, 0), ones(1, 3), p=1.0, clip=0.2)[:, :1], log_ratios)[0]
    assert (slope != 0).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="must be positive"):
        holder_po(log_ratios, row(0, 0, 0), ones(1, 3), clip=0.0)


def literal_token_objective(log_ratio: Tensor, advantage: float, p: float) -> Tensor:
    """The released expression for one row: the power mean of one-sided clipped ratios times A."""
    ratio = log_ratio.exp()
    held = torch.minimum(ratio, ratio.clamp(0.8, 1.2)) if advantage > 0 else torch.maximum(ratio, ratio.clamp(0.8, 1.2))
    mean = held.log().mean().exp() if p == 0 else (held**p).mean() ** (1 / p)
    return advantage * mean


@pytest.mark.parametrize("p", [-2.0, -1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("advantage", [1.0, -0.7])
def test_token_clip_has_the_value_and_gradient_of_the_released_expression(p: float, advantage: float) -> None:
    log_ratio, a = row(0.5, 0.9, 1.1, 1.3, 2.0).log(), row(*[advantage] * 5)
    found = token_clipped(log_ratio, a, ones(1, 5), p=p)
    close(found, float(literal_token_objective(log_ratio, advantage, p)))
    slope = gradient(lambda x: token_clipped(x, a, ones(1, 5), p=p) / 5, log_ratio)[0]
    close(slope, gradient(lambda x: literal_token_objective(x, advantage, p), log_ratio)[0])
    clipped = [False, False, False, True, True] if advantage > 0 else [True, False, False, False, False]
    assert (slope == 0).tolist() == [clipped]


def test_token_clip_at_p_one_is_grpo() -> None:
    # The mean of one-sided clipped ratios is the sequence mean of PPO's objective.
    rollouts, signals = synthetic_batch()
    plain = make("grpo", kl_coef=0.0).override(advantage={"eps": 1e-8})
    found = coefficients_of(make("holder-po", variant="token", p=1.0), rollouts, signals)
    close(found, coefficients_of(plain, rollouts, signals))


def test_token_clip_ignores_padding_under_tensor_bounds() -> None:
    mask = torch.tensor([[True, False, True]])
    zero = torch.where(mask, 0.8, 0.0).double(), torch.where(mask, 1.2, 0.0).double()
    log_ratio, a = row(0.1, NAN, -0.1), row(1.0, NAN, 1.0)
    for p in (-2.0, 0.0, 2.0):
        found = token_clipped(log_ratio, a, mask, *zero, p=p)
        close(found[mask], token_clipped(row(0.1, -0.1), row(1.0, 1.0), ones(1, 2), p=p)[0])
        assert found[0, 1] == 0
        slope = gradient(lambda x, p=p: token_clipped(x, a, mask, *zero, p=p), log_ratio)[0]
        assert slope[0, 1] == 0
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("p", [-2.0, 0.0, 0.7, 3.0])
def test_token_multiplier_is_the_gradient_for_every_exponent(p: float) -> None:
    g = torch.Generator().manual_seed(7)
    leaf = (torch.randn(60, 4, generator=g, dtype=torch.float64) * 0.4).requires_grad_()
    a = torch.randn(60, 4, generator=g, dtype=torch.float64)
    values = {"logprobs": leaf, "log_ratio": leaf, "advantages": a, "lo": 0.8, "hi": 1.28}
    ctx = Context(values, torch.rand(60, 4, generator=g) < 0.8)
    bound = bind("holder-po/token", "surrogate", p=p)
    (slope,) = torch.autograd.grad(ctx.call(bound).sum(), leaf)
    closed = ctx.multiplier(bound)
    assert closed is not None
    close(slope, torch.where(ctx.mask, closed * a, torch.zeros_like(a)))


# -- schedules


def test_exponent_is_annealed_from_two_to_minus_two() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("holder-po")
    for step, p in ((0, 2.0), (125, 1.0), (250, 0.0), (500, -2.0), (900, -2.0)):
        fixed = coefficients_of(make("holder-po", p=p), rollouts, signals)
        close(coefficients_of(algorithm, rollouts, signals, step=step), fixed)


@pytest.mark.parametrize("step", [0, 100, 250, 400, 500, 700])
def test_released_schedules_that_the_library_has(step: int) -> None:
    x = min(1.0, step / 500)
    assert Schedule("linear", -2.0, 2.0, steps=500).at(step) == pytest.approx(-2 + 4 * x)
    assert Schedule("linear", 2.0, -2.0, steps=500).at(step) == pytest.approx(2 - 4 * x)
    assert Schedule("cosine", -2.0, 2.0, steps=500).at(step) == pytest.approx(-2 * math.cos(math.pi * x))
    assert Schedule("cosine", 2.0, -2.0, steps=500).at(step) == pytest.approx(2 * math.cos(math.pi * x))


def test_schedule_survives_the_recipe() -> None:
    algorithm = make("holder-po", p={"schedule": "cosine", "start": 1.0, "end": -1.0, "steps": 9})
    again = Algorithm.from_recipe(algorithm.recipe())
    assert again.log_ratio == algorithm.log_ratio
    assert again.log_ratio.params["p"] == Schedule("cosine", 1.0, -1.0, steps=9)


def test_mechanisms_show_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    found = {v: coefficients_of(make("holder-po", variant=v), rollouts, signals) for v in ("sequence", "token", "both")}
    for name, value in found.items():
        assert not torch.allclose(value, coefficients_of(make("holder-po", variant=name, p=0.0), rollouts, signals))
    assert not torch.allclose(found["sequence"], found["token"])
    assert not torch.allclose(found["sequence"], found["both"])
