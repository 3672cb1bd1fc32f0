"""The figures on made-up estimates whose moments are known."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.lab.figures import Credit, Direction
from tokenloom.lab.intervals import jackknife, over_seeds, t_quantile


def test_direction_figures_are_unbiased_and_their_intervals_hold() -> None:
    """200 experiments of 12 Gaussian estimates each: means of the figures and how often an interval holds the truth."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    mean = torch.tensor([3.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    tokens = torch.full((12,), 10.0, dtype=torch.float64)
    # |mean|^2 = 29, along truth 25, variance 4 entries of 0.5^2 each.
    expected = {"scale": 1.0, "bias": 29 * 25 / 625 - 1, "noise": 10 * 1.0 * 25 / 625, "snr": 29 / 10,
                "cosine": 5 / math.sqrt(29)}  # fmt: skip
    found: dict[str, list[tuple[float, bool]]] = {n: [] for n in expected}
    for _ in range(200):
        estimates = mean + 0.5 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
        for name, estimate in Direction(estimates, truth, tokens).figures().items():
            found[name].append((estimate.value, abs(estimate.value - expected[name]) < estimate.half))
    for name, values in found.items():
        average = sum(v for v, _ in values) / 200
        # snr divides by an estimated variance with 44 degrees of freedom: 1 / E[1 / chi2] adds 2 / 42.
        assert average == pytest.approx(expected[name], rel=0.07), name
        held = sum(h for _, h in values) / 200
        # Binomial around 95 %, deviation 1.5 %; the jackknife is a little short at 12 batches.
        assert held > 0.88, (name, held)


def test_noise_alone_is_no_bias() -> None:
    """The naive cosine of ten noisy unbiased estimates is 0.3; corrected for noise it is around 1."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.zeros(1000, dtype=torch.float64)
    truth[0] = 1
    estimates = truth + torch.randn(10, 1000, generator=generator, dtype=torch.float64) * 0.1
    naive = float(estimates.mean(0)[0] / estimates.mean(0).norm())
    found = Direction(estimates, truth, torch.ones(10, dtype=torch.float64)).figures()["cosine"]
    assert naive < 0.75
    assert abs(found.value - 1) < found.half


def test_a_part_along_the_gradient_that_is_rounding_is_none() -> None:
    estimates = torch.zeros(8, 3, dtype=torch.float64)
    estimates[:, 1] = torch.linspace(1, 2, 8)
    estimates[:, 0] = 1e-16
    truth = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    found = Direction(estimates, truth, torch.ones(8, dtype=torch.float64)).figures()
    assert found["cosine"].value == 0
    assert math.isinf(found["bias"].value)


def test_credit_figures_are_the_plain_formulas() -> None:
    generator = torch.Generator().manual_seed(2)
    given, deserved = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    given = given + deserved
    credit = Credit(50)
    cell = torch.randint(50, (400,), generator=generator)
    for part in torch.arange(400).split(100):
        credit.add(given[part], deserved[part], cell[part])
    found = credit.figures()
    correlation = float(torch.corrcoef(torch.stack([given, deserved]))[0, 1])
    assert found["correlation"].value == pytest.approx(correlation, abs=1e-12)
    scale = float(given @ deserved / (given @ given))
    error = float(((scale * given - deserved) ** 2).sum() / (deserved**2).sum()) ** 0.5
    assert found["error"].value == pytest.approx(error, abs=1e-12)
    assert 0 < found["correlation"].half < 0.3


def test_mean_credit_sees_through_noise() -> None:
    """Credit = 2 x what is deserved + noise of ten times its size: single tokens correlate little, means fully."""
    generator = torch.Generator().manual_seed(3)
    deserved = torch.randn(20, generator=generator, dtype=torch.float64)
    credit = Credit(20)
    for _ in range(20):
        cell = torch.randint(20, (2000,), generator=generator)
        noise = torch.randn(2000, generator=generator, dtype=torch.float64)
        credit.add(2 * deserved[cell] + 20 * noise, deserved[cell], cell)
    found = credit.figures()
    assert found["correlation"].value < 0.2
    # The means' error is 20 / sqrt(2000) = 0.45 against a spread of 2: its square is 5 %, and known to a third of it.
    assert found["mean_correlation"].value == pytest.approx(1, abs=0.05)


def test_credit_that_is_constant_or_opposed() -> None:
    deserved = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    cell = torch.tensor([0, 1, 0, 1])
    opposed, constant = Credit(2), Credit(2)
    for _ in range(3):
        opposed.add(-deserved, deserved, cell)
        constant.add(torch.zeros(4, dtype=torch.float64), deserved, cell)
    assert opposed.figures()["correlation"].value == pytest.approx(-1)
    assert opposed.figures()["error"].value == 1
    assert math.isnan(constant.figures()["correlation"].value)


def test_t_quantiles() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 10: 2.22814, 30: 2.04227, 1000: 1.96234}
    for freedom, value in table.items():
        assert t_quantile(freedom) == pytest.approx(value, rel=8e-3 if freedom == 3 else 3e-3), freedom


def test_the_jackknife_of_a_mean_is_the_standard_error() -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknife(lambda w: w @ x, 9)
    assert found.value == pytest.approx(float(x.mean()), abs=1e-12)
    assert found.half == pytest.approx(t_quantile(8) * float(x.std()) / 3, abs=1e-12)


def test_over_seeds() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.half) == pytest.approx((2.0, t_quantile(2) / math.sqrt(3)))
    assert math.isnan(over_seeds([1.0]).half)
    assert math.isnan(over_seeds([1.0, math.nan]).value)
    assert math.isnan(over_seeds([1.0, math.inf]).value)
