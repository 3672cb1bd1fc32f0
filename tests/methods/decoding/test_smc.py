"""Resampling: children are proportional to weights, and what weights stand for stays the same on average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokenloom.draw import RandomDraw, law_of
from tokenloom.methods.decoding.smc import (
    effective_size,
    log_mean_exp,
    multinomial,
    resampled,
    stratified,
    systematic,
)

WEIGHTS = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
SCHEMES = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic}


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_children_are_proportional_to_weights(scheme: str) -> None:
    resample: Any = SCHEMES[scheme]
    law = law_of(lambda draw: tuple(resample(WEIGHTS.log() + 5, draw)))
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    for i in range(4):
        children = sum(mass * ancestors.count(i) for ancestors, mass in law.items())
        assert children == pytest.approx(4 * float(WEIGHTS[i]), abs=1e-9)
    with pytest.raises(ValueError, match="weight 0"):
        resample(torch.full((3,), -torch.inf), RandomDraw())


def _variance(scheme: Any, weights: torch.Tensor, i: int) -> float:
    law = law_of(lambda draw: scheme(weights.log(), draw).count(i))
    mean = sum(n * mass for n, mass in law.items())
    return sum((n - mean) ** 2 * mass for n, mass in law.items())


def test_strata_vary_less_than_draws_and_one_point_for_all_least() -> None:
    law = law_of(lambda draw: tuple(systematic(WEIGHTS.log(), draw)))
    for ancestors in law:
        for i in range(4):
            assert math.floor(4 * float(WEIGHTS[i])) <= ancestors.count(i) <= math.ceil(4 * float(WEIGHTS[i]))
    # 4 draws of 0.3: 4 x 0.3 x 0.7. Strata: the third is it for sure, the fourth with 0.2 of its mass.
    assert _variance(multinomial, WEIGHTS, 2) == pytest.approx(0.84, abs=1e-9)
    assert _variance(stratified, WEIGHTS, 2) == pytest.approx(0.16, abs=1e-9)
    # Not every pair is ordered, but draws are never better than strata.
    weights = torch.tensor([0.1, 0.45, 0.25, 0.2], dtype=torch.float64)
    for i in range(4):
        assert _variance(stratified, weights, i) <= _variance(multinomial, weights, i) + 1e-12


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_sums_of_weights_are_kept_on_average(scheme: Any) -> None:
    """E[sum of the children's weights over those of particle i] is i's own weight."""
    log_weights = torch.tensor([0.1, 2.0, -torch.inf, 0.7], dtype=torch.float64)
    total = [0.0] * 4
    for (ancestors, weight), mass in law_of(lambda draw: _made(log_weights, draw, scheme)).items():
        for i in ancestors:
            total[i] += mass * weight
    assert total == pytest.approx(log_weights.exp().tolist(), abs=1e-9)


def _made(log_weights: torch.Tensor, draw: Any, scheme: Any) -> tuple[tuple[int, ...], float]:
    found = resampled(log_weights, draw, ess=1.0, resampling=scheme)
    assert found is not None
    ancestors, weights = found
    assert len(set(weights.tolist())) == 1
    return tuple(ancestors), math.exp(float(weights[0]))


def test_even_and_lost_swarms_stay_as_they_are() -> None:
    draw = RandomDraw(torch.Generator().manual_seed(0))
    uneven = torch.tensor([0.0, -9.0, -9.0, -9.0])
    assert resampled(uneven, draw, ess=0.5) is not None
    assert resampled(uneven, draw, ess=0.2) is None
    assert resampled(uneven, draw, ess=0.0) is None
    assert resampled(torch.zeros(4), draw, ess=1.0) is None
    assert resampled(torch.full((4,), -torch.inf), draw, ess=1.0) is None


def test_effective_size_and_mean() -> None:
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_size(weights.log() - 800) == pytest.approx(1 / (0.25 + 0.125))
    assert effective_size(torch.full((3,), -torch.inf)) == 0.0
    assert log_mean_exp(weights.log()) == pytest.approx(math.log(1 / 3))
    assert log_mean_exp(torch.full((3,), -torch.inf)) == -math.inf
