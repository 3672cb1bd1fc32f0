"""80/20: only the most uncertain tokens are trained on."""

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
    rollouts_of,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.entropy_8020 import entropy_8020


def test_defaults() -> None:
    assert defaults("entropy-8020") == {"rho": 0.2}
    assert preset_defaults("entropy-8020") == {"dialect": "paper", "rho": 0.2}


@pytest.mark.parametrize("number", [1, 2, 5, 9, 10, 11, 21, 33, 100])
@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 0.75])
def test_number_of_survivors(number: int, rho: float) -> None:
    entropies = torch.randperm(number, generator=torch.Generator().manual_seed(number)).double()[None]
    kept = int(entropy_8020(entropies, ones(1, number), rho=rho).sum())
    assert kept == number - math.ceil(round((1 - rho) * (number - 1), 9))


def test_two_of_ten_survive_the_highest() -> None:
    entropies = torch.arange(10.0)[None].flip(-1)
    assert entropy_8020(entropies, ones(1, 10)).tolist() == [[1, 1] + [0] * 8]


def test_ties_at_the_threshold_all_survive() -> None:
    entropies = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.5]])
    assert entropy_8020(entropies, ones(1, 6)).tolist() == [[0, 1, 1, 1, 1, 0]]
    # Zero is an entropy like any other: on a certain batch everything ties.
    assert entropy_8020(torch.zeros(1, 4), ones(1, 4)).tolist() == [[1] * 4]


def test_masked_positions_are_never_selected_nor_counted() -> None:
    mask = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])
    entropies = torch.tensor([[1.0, 2.0, 3.0, 50.0, NAN], [4.0, 5.0, math.inf, 9.0, 9.0]])
    assert entropy_8020(entropies, mask).tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert entropy_8020(entropies, mask, rho=1.0).tolist() == mask.float().tolist()


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.5])
def test_impossible_fractions_are_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=str(rho)):
        entropy_8020(torch.zeros(1, 1), ones(1), rho=rho)


@pytest.mark.parametrize(
    ("dialect", "base"), [("paper", {"preset": "dapo"}), ("trl", {"preset": "grpo", "dialect": "trl"})]
)
def test_keeping_everything_is_the_base(dialect: str, base: dict[str, str]) -> None:
    rollouts, signals = synthetic_batch()
    slug = base["preset"]
    plain = make(slug, **{k: v for k, v in base.items() if k != "preset"})
    close(
        coefficients_of(make("entropy-8020", dialect=dialect, rho=1.0), rollouts, signals),
        coefficients_of(plain, rollouts, signals),
    )


def test_dropped_tokens_stay_in_the_normalizer_and_keep_their_kl() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 1, 0]])
    entropies = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]], dtype=torch.float64)
    ref = torch.full((2, 3), -1.5, dtype=torch.float64)
    signals = signals_of(rollouts, entropies=entropies, ref_logprobs=ref)
    algorithm = make("entropy-8020", dialect="trl", rho=0.4)
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    # Threshold: the 0.6-quantile of 1..5 is 3.4, so 5 and 4 survive; five tokens divide.
    expected = torch.tensor([[0, a, 0], [0, -a, 0]], dtype=torch.float64) / 5
    close(coefficients_of(algorithm, rollouts, signals), expected)
    with_kl = coefficients_of(algorithm.with_term("kl", coef=0.1), rollouts, signals)
    close(with_kl, expected - rollouts.mask * 0.1 * (1 - math.exp(-0.5)) / 5)
    counted = coefficients_of(algorithm.override(aggregate={"count": "weights"}), rollouts, signals)
    close(counted, expected * 5 / 2)


def test_entropy_carries_no_gradient() -> None:
    entropies = torch.rand(1, 5, requires_grad=True)
    assert not entropy_8020(entropies, ones(1, 5)).requires_grad
