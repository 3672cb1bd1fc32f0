"""Best-of-N: the choice, its exact law, its divergence."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.best_of_n import best_of_n, best_of_n_law, kl_bound

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_the_first_of_the_largest() -> None:
    assert best_of_n([1.0, 3.0, 3.0, -math.inf]) == 1
    assert best_of_n([-math.inf]) == 0
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="rewards of one response at least"):
            best_of_n(bad)


def test_worked_law() -> None:
    # F = .5, .8, 1: squares .25, .64, 1 and their differences.
    law = best_of_n_law(P, torch.tensor([0.0, 1.0, 2.0]), n=2)
    torch.testing.assert_close(law, torch.tensor([0.25, 0.39, 0.36], dtype=torch.float64), rtol=0, atol=1e-12)
    # The two last are equally good: .75 shared as .3 to .2.
    law = best_of_n_law(P, torch.tensor([0.0, 1.0, 1.0]), n=2)
    torch.testing.assert_close(law, torch.tensor([0.25, 0.45, 0.30], dtype=torch.float64), rtol=0, atol=1e-12)


def test_limits_and_impossible_outcomes() -> None:
    rewards = torch.tensor([2.0, 0.0, 1.0])
    torch.testing.assert_close(best_of_n_law(P, rewards, n=1), P)
    assert best_of_n_law(P, rewards, n=200)[0] == pytest.approx(1.0)
    law = best_of_n_law(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.0, 5.0, 1.0]), n=3)
    assert law.tolist() == [0.125, 0.0, 0.875]
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_law(P, rewards, n=0)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_divergence_stays_below_the_bound_and_comes_near(n: int) -> None:
    def divergence(outcomes: int) -> float:
        p = torch.full((outcomes,), 1 / outcomes, dtype=torch.float64)
        law = best_of_n_law(p, torch.arange(float(outcomes)), n=n)
        return float(torch.special.xlogy(law, law / p).sum())

    assert divergence(3) <= kl_bound(n=n) + 1e-12
    assert divergence(20000) == pytest.approx(kl_bound(n=n), abs=2e-3)
