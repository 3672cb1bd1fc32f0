"""KL-Cov: the tokens of highest covariance pay for every change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    advantages_of,
    close,
    coefficients_of,
    defaults,
    gradient,
    loss_of,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.kl_cov import kl_cov, top_covariance
from tokenloom.signals import Signals


def loss_by_loop(
    advantages: Tensor, logprobs: Tensor, old: Tensor, mask: Tensor, *, k: float, beta: float
) -> tuple[float, set[tuple[int, int]]]:
    """The rule token by token, in plain Python, with the selected places."""
    places = [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if bool(mask[i, t])]
    mean_a = sum(float(advantages[p]) for p in places) / len(places)
    mean_lp = sum(float(logprobs[p]) for p in places) / len(places)
    ranked = sorted(places, key=lambda p: -(float(advantages[p]) - mean_a) * (float(logprobs[p]) - mean_lp))
    chosen = set(ranked[: max(1, int(k * len(places)))])
    total = 0.0
    for p in places:
        change = float(logprobs[p] - old[p])
        total -= float(advantages[p]) * float(torch.tensor(change).exp())
        total += beta * abs(change) if p in chosen else 0.0
    return total / len(places), chosen


def test_defaults() -> None:
    assert defaults("kl-cov") == {}
    assert defaults("kl-cov/select") == {"k": 2e-4}
    assert preset_defaults("kl-cov") == {"dialect": "paper", "k": 2e-4, "coef": None}
    for settings, coef in (({}, 1.0), ({"dialect": "verl"}, 0.1), ({"dialect": "verl", "coef": 0.5}, 0.5)):
        assert make("kl-cov", **settings).terms[0].coef == coef


def test_penalty_is_the_absolute_log_ratio() -> None:
    close(kl_cov(row(0.5, -0.25, 0.0), ones(1, 3)), [[0.5, 0.25, 0.0]])
    close(gradient(lambda x: kl_cov(x, ones(1, 3)), row(0.5, -0.25, 0.0))[0], [[1.0, -1.0, 0.0]])


def test_selection_worked_numbers() -> None:
    # cov 2, 0, 1 as in Clip-Cov; the fourth is off the mask.
    mask = torch.tensor([[True, True, True, False]])
    inputs = row(3.0, 0.0, 0.0, 100.0), row(-1.0, -2.0, -3.0, 50.0), mask
    assert top_covariance(*inputs).tolist() == [[1, 0, 0, 0]]
    assert top_covariance(*inputs, k=0.7).tolist() == [[1, 0, 1, 0]]
    assert top_covariance(*inputs, k=1.0).tolist() == [[1, 1, 1, 0]]
    assert top_covariance(*inputs, k=0.0).tolist() == [[0, 0, 0, 0]]


def test_selection_reads_transposed_log_probs() -> None:
    advantages, logprobs = row(3.0, 0.0).T, torch.tensor([[-1.0], [-2.0]]).double()
    assert top_covariance(advantages.repeat(1, 2), logprobs.repeat(1, 2).T.contiguous().T, ones(2, 2), k=0.5).sum() == 2


@pytest.mark.parametrize("k", [2e-4, 0.05, 0.3])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_and_gradient_equal_the_loop(k: float, beta: float) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("kl-cov", k=k, coef=beta)
    advantages = advantages_of(algorithm, rollouts, signals)
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    loss, chosen = loss_by_loop(advantages, signals.logprobs, signals.old_logprobs, rollouts.mask, k=k, beta=beta)
    close(loss_of(algorithm, rollouts, signals), loss, 1e-6)
    change = torch.where(rollouts.mask, signals.logprobs - signals.old_logprobs, torch.zeros(12, 8).double())
    selected = torch.zeros(12, 8).double()
    for place in chosen:
        selected[place] = 1
    expected = advantages * change.exp() - beta * selected * change.sign()
    close(coefficients_of(algorithm, rollouts, signals), expected * rollouts.mask / rollouts.mask.sum())


def test_without_the_penalty_it_is_the_unclipped_gradient() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("kl-cov", coef=0.0)
    plain = algorithm.override(terms=None)
    close(coefficients_of(algorithm, rollouts, signals), coefficients_of(plain, rollouts, signals))
    assert plain.surrogate.part.name == "importance"


def test_nothing_is_clipped() -> None:
    rollouts = rollouts_of([1.0, 0.0])
    lp = vector(0.0, 0.0)[:, None]
    signals = Signals(logprobs=lp, old_logprobs=lp - vector(10.0, 0.1).log()[:, None])
    found = coefficients_of(make("kl-cov", k=0.0), rollouts, signals)
    close(found, torch.tensor([[10.0], [-0.1]]) * 0.7071058 / 2, 1e-6)


@pytest.mark.parametrize("k", [-0.1, 1.5])
def test_impossible_fractions_are_refused(k: float) -> None:
    with pytest.raises(ValueError, match=str(k)):
        top_covariance(row(1.0), row(-1.0), ones(1), k=k)
