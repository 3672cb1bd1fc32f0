"""ASPO: flipped ratios for positive tokens, soft caps, bounds by entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
    NAN,
    advantages_of,
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
from tokenloom.methods.policy_optimization.aspo import aspo, entropy_bounds, row_quantile

POSITIVE = [(0.2, 3.0), (0.5, 2.0), (1.0, 1.0), (1.1, 0.909091), (1.3, 0.0)]
NEGATIVE = [(0.5, 0.0), (0.9, 0.9), (1.0, 1.0), (2.0, 2.0), (5.0, 3.0)]


def slope(ratio: float, advantage: float, lo: float = 0.8, hi: float = 1.2, cap: float = 3.0) -> Tensor:
    """d objective / d logprob / A."""
    old = torch.full((1, 1), -2.0, dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        return aspo(x - old, row(advantage), x, ones(1), lo, hi, cap)

    return gradient(objective, old + math.log(ratio))[0] / advantage


def test_defaults() -> None:
    assert defaults("aspo/entropy-bounds") == {"quantile": 0.8, "low_entropy": 0.2, "high_entropy": 0.4, "cap": 3.0}
    assert preset_defaults("aspo") == {"epochs": 3, "kl_coef": 1e-3}
    algorithm = make("aspo")
    assert algorithm.aggregate.part.name == "token-mean"
    assert [(t.part.part.name, t.coef, t.part.params["estimator"]) for t in algorithm.terms] == [("kl", 1e-3, "k3")]
    assert make("aspo", kl_coef=0.0).terms == ()


@pytest.mark.parametrize(("ratio", "multiplier"), POSITIVE)
@pytest.mark.parametrize("advantage", [1.0, 0.3])
def test_multipliers_of_positive_tokens(ratio: float, multiplier: float, advantage: float) -> None:
    close(slope(ratio, advantage), multiplier, 1e-6)


@pytest.mark.parametrize(("ratio", "multiplier"), NEGATIVE)
@pytest.mark.parametrize("advantage", [-1.0, -2.5])
def test_multipliers_of_negative_tokens(ratio: float, multiplier: float, advantage: float) -> None:
    close(slope(ratio, advantage), multiplier, 1e-6)


def test_positive_tokens_that_rose_pull_less_and_those_that_fell_more() -> None:
    # PPO's weight is the ratio itself: 1.1 and 0.5.
    assert slope(1.1, 1.0) < 1.0 < slope(0.5, 1.0)


def test_cap_is_soft() -> None:
    for ratio, advantage in ((1e-6, 1.0), (1e6, -1.0)):
        close(slope(ratio, advantage), 3.0, 1e-9)
        close(slope(ratio, advantage, cap=7.0), 7.0, 1e-9)


def test_values_outside_the_capped_branch() -> None:
    log_ratio, advantages = row(0.5, 1.3, 0.5, 2.0).log(), row(1.0, 1.0, -1.0, -1.0)
    close(aspo(log_ratio, advantages, row(-1, -1, -1, -1), ones(1, 4)), [[2.0, 1 / 1.2, -0.8, -2.0]])


def test_without_a_cap_nothing_is_infinite() -> None:
    ratio = row(1e-8, 0.5, 1.0, 1e8, 0.5, 1e8)
    advantages = row(1.0, 1.0, 1.0, 1.0, -1.0, -1.0)
    found = gradient(lambda x: aspo(x, advantages, x, ones(1, 6), 0.8, 1.2, INF), ratio.log())[0]
    close(found, [[1e8, 2.0, 1.0, 0.0, 0.0, -1e8]], 1e-6)


def test_tensor_bounds() -> None:
    old, lo, hi = row(0, 0), row(0.8, 0.6), row(1.4, 1.2)
    found = gradient(lambda x: aspo(x - old, row(1.0, -1.0), x, ones(1, 2), lo, hi, row(3, 3)), row(1.3, 0.7).log())[0]
    close(found, [[1 / 1.3, -0.7]])
    found = gradient(lambda x: aspo(x - old, row(1.0, -1.0), x, ones(1, 2), hi - 0.4, lo + 0.4), row(1.3, 0.7).log())[0]
    close(found, 0.0)


def test_zero_advantage_and_padding() -> None:
    mask = torch.tensor([[True, False]])
    log_ratio, logprobs = row(2.0, NAN), row(-1.0, INF)
    close(aspo(log_ratio, row(0.0, NAN), logprobs, mask), 0.0)
    for found in gradient(lambda x, y: aspo(x, row(0.0, NAN), y, mask), log_ratio, logprobs):
        close(found, 0.0)


# -- bounds


def test_quantile_is_that_of_the_rows_sampled_tokens() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.entropies is not None
    holes = torch.where(rollouts.mask, signals.entropies, torch.full_like(signals.entropies, NAN))
    for q in (0.0, 0.3, 0.8, 1.0):
        expected = torch.nanquantile(holes, q, -1, keepdim=True)
        found = row_quantile(signals.entropies, rollouts.mask, q)
        live = rollouts.mask.any(-1)
        close(found[live], expected[live])
        assert bool((found[~live] == INF).all())


def test_uncertain_tokens_get_the_wider_bounds() -> None:
    # Of five the 0.8-quantile lies at 3.2 between 4 and 5: only the last exceeds it. The pad would be the largest.
    entropies = torch.tensor([[5.0, 1.0, 2.0, 99.0, 3.0, 4.0]])
    mask = torch.tensor([[True, True, True, False, True, True]])
    lo, hi, cap = entropy_bounds(entropies, mask)
    close(lo[mask], [0.6, 0.8, 0.8, 0.8, 0.8], 1e-7)
    close(hi[mask], [1.4, 1.2, 1.2, 1.2, 1.2], 1e-7)
    assert cap == 3.0


def test_ties_and_single_tokens_are_certain() -> None:
    lo, hi, _ = entropy_bounds(
        torch.tensor([[2.0, 2.0, 2.0], [7.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True, False, False]])
    )
    close(lo, 0.8, 1e-7)
    close(hi, 1.2, 1e-7)


def test_rows_are_split_on_their_own() -> None:
    entropies = torch.arange(20.0).reshape(2, 10)
    _, hi, _ = entropy_bounds(entropies, ones(2, 10))
    assert (hi > 1.3).sum(-1).tolist() == [2, 2]
    _, hi, _ = entropy_bounds(entropies, ones(2, 10), quantile=0.5)
    assert (hi > 1.3).sum(-1).tolist() == [5, 5]


@pytest.mark.parametrize("fill", [NAN, INF, -INF])
def test_hostile_padding_and_gradients_stay_out_of_the_bounds(fill: float) -> None:
    rollouts, signals = synthetic_batch()
    assert signals.entropies is not None
    entropies = signals.entropies.clone().requires_grad_()
    lo, hi, _ = entropy_bounds(entropies, rollouts.mask)
    assert not lo.requires_grad
    assert not hi.requires_grad
    poisoned = torch.where(rollouts.mask, signals.entropies, torch.full_like(signals.entropies, fill))
    again = entropy_bounds(poisoned, rollouts.mask)
    assert torch.equal(lo, again[0])
    assert torch.equal(hi, again[1])


def test_no_token_at_all() -> None:
    lo, hi, _ = entropy_bounds(torch.zeros(2, 0), ones(2, 0))
    assert lo.shape == hi.shape == (2, 0)


@pytest.mark.parametrize("wrong", [{"quantile": 1.5}, {"low_entropy": -0.1}, {"high_entropy": -1.0}, {"cap": 1.0}])
def test_impossible_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="aspo needs"):
        entropy_bounds(torch.zeros(1, 1), ones(1), **wrong)


# -- the composition


def test_coefficients_of_a_batch() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 1, 0]])
    signals = signals_of(rollouts, torch.cat([row(0.5, 1.3, 1.3), row(0.7, 5.0, 1.0)]).log())
    # Row 0's last and row 1's first token are the uncertain ones: bounds 0.6 and 1.4.
    signals = signals.replace(entropies=torch.tensor([[0.1, 0.2, 3.0], [3.0, 0.1, 0.0]]).double())
    algorithm = make("aspo", kl_coef=0.0)
    a = advantages_of(algorithm, rollouts, signals)
    multipliers = torch.cat([row(2.0, 0.0, 1 / 1.3), row(0.7, 3.0, 0.0)])
    close(coefficients_of(algorithm, rollouts, signals), multipliers * a / 5)


def test_on_policy_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    same = signals.replace(old_logprobs=signals.logprobs)
    plain = make("grpo", kl_coef=0.0).override(aggregate="token-mean")
    close(coefficients_of(make("aspo", kl_coef=0.0), rollouts, same), coefficients_of(plain, rollouts, same))


def test_mechanisms_show_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("aspo", kl_coef=0.0)
    found = coefficients_of(algorithm, rollouts, signals)
    for without in ({"surrogate": "ppo-clip"}, {"bounds": {"high_entropy": 0.2}}):
        assert not torch.allclose(found, coefficients_of(algorithm.override(**without), rollouts, signals))
