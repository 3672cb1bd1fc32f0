"""SPLIT: the sheet's numbers, log odds against probabilities, limits, the three forms of an intervention."""

from __future__ import annotations

import math

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.split_steering import (
    preference_log_odds,
    split_loss,
    steered_linear,
    utility_log_odds,
)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_worked_numbers() -> None:
    wanted, unwanted = numbers(1.0), numbers(2.0)
    close(preference_log_odds(wanted, unwanted), numbers(1.0))
    close(utility_log_odds(wanted, unwanted), numbers(0.012859), 1e-6)
    close(split_loss(wanted, unwanted), 2.0)  # the hinge is not active
    close(split_loss(unwanted, wanted), 2.0 + 0.5 + 8 * 1.3)


def test_log_odds_are_those_of_the_probabilities() -> None:
    p, n = numbers(0.3, 1e-9, 1e-30), numbers(0.2, 2e-9, 3e-30)
    close(preference_log_odds(-p.log(), -n.log()), (p / n).log())
    odds = utility_log_odds(-p.log(), -n.log())
    close(odds[:1], [math.log(0.5 / 0.5)], 1e-12)
    close(odds[1:], (p + n)[1:].log(), 1e-8)
    # Means over tokens are no probabilities of the two: they may sum to more than 1.
    assert utility_log_odds(numbers(0.1), numbers(0.2)) == math.inf
    assert utility_log_odds(numbers(math.log(2)), numbers(math.log(2))) == math.inf


def test_the_hinge_acts_on_each_pair_and_pulls_both_ways() -> None:
    wanted = numbers(1.0, 1.0).requires_grad_()
    unwanted = numbers(1.2, 3.0).requires_grad_()
    split_loss(wanted, unwanted).backward()
    close(wanted.grad, [(1 + 8) / 2, 1 / 2])
    close(unwanted.grad, [(0.5 - 8) / 2, 0.5 / 2])


def test_without_margin_and_negative_it_is_supervised_tuning() -> None:
    close(split_loss(numbers(1.0, 3.0), numbers(0.0, 0.0), weight_negative=0.0, weight_margin=0.0), 2.0)


def test_the_reference_term_punishes_what_got_worse() -> None:
    wanted, unwanted = numbers(1.0, 1.0), numbers(2.0, 2.0)
    close(split_loss(wanted, unwanted, numbers(0.6, 1.5), numbers(2.5, 1.9), weight_reference=2.0), 2.0 + 0.4 + 0.1)
    with pytest.raises(ValueError, match="reference losses"):
        split_loss(wanted, unwanted, weight_reference=1.0)


def test_vector_low_rank_and_full_forms_of_an_intervention() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 3), (4, 3), (4,)))
    down, up, v = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 3), (4, 2), (4,)))
    base = x @ w.T + b
    close(steered_linear(x, w, b, up @ down, v, multiplier=0.0), base)
    close(steered_linear(x, w, b, delta_bias=v, multiplier=3.0), base + 3 * v)
    close(steered_linear(x, w, delta_bias=v, multiplier=3.0), x @ w.T + 3 * v)
    close(steered_linear(x, w, b, up @ down, multiplier=2.0), base + 2 * (x @ down.T) @ up.T)
    close(steered_linear(x, w), x @ w.T)
