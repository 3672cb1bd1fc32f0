"""MIS (IcePop): weights outside the interval become zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.mis import mis

MASK = torch.tensor([[True, True, False], [True, True, True]])
GAP = torch.tensor([[4.0, 0.25, 77.0], [1.5, 0.5, 1.0]], dtype=torch.float64).log()
ZERO = torch.zeros(2, 3, dtype=torch.float64)


def test_defaults() -> None:
    assert defaults("mis") == {"level": "token", "minimum": 0.5, "maximum": 2.0, "normalize": False}
    assert preset_defaults("mis") == {"dialect": "icepop"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0, 0, 0], [1.5, 0.5, 1.0]]),
        ({"minimum": None}, [[0, 0.25, 0], [1.5, 0.5, 1.0]]),
        ({"maximum": None}, [[4.0, 0, 0], [1.5, 0.5, 1.0]]),
        ({"level": "sequence", "minimum": 0.8}, [[1.0, 1.0, 0], [0, 0, 0]]),
        ({"level": "sequence", "minimum": None, "maximum": 3.0}, [[1.0, 1.0, 0], [0.75] * 3]),
        ({"level": "sequence", "minimum": None, "maximum": 0.8}, [[0, 0, 0], [0.75] * 3]),
    ],
)
def test_worked_numbers(settings: dict[str, Any], expected: list[list[float]]) -> None:
    close(mis(GAP, ZERO, MASK, **settings), expected)


def test_bounds_are_inclusive() -> None:
    close(mis(row(0.0, 0.0), row(0.0, 0.0), ones(1, 2), minimum=1.0, maximum=1.5), 1.0)
    close(mis(row(0.0, 0.0), row(0.0, 0.0), ones(1, 2), maximum=1.0), 1.0)


def test_a_missing_sampler_log_prob_counts_as_ratio_one() -> None:
    close(mis(row(3.0, 3.0), row(NAN, 0.0), ones(1, 2)), [[1.0, 0.0]])


def test_dropped_tokens_count_in_the_mean() -> None:
    # (0 + 0 + 1.5 + 0.5 + 1) / 5 = 0.6
    close(mis(GAP, ZERO, MASK, normalize=True), mis(GAP, ZERO, MASK) / 0.6)
    close(mis(GAP, ZERO - 9, MASK, normalize=True), 0.0)


def test_wide_interval_is_tis_without_truncation() -> None:
    close(mis(GAP, ZERO, MASK, minimum=None, maximum=None), MASK * torch.where(MASK, GAP, ZERO).exp())


def test_trl_masks_whole_responses_above_three() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0], sampler_logprobs=-1 - vector(2.9, 3.1, 1e-3, 1.0).log()[:, None])
    signals = signals_of(rollouts)
    advantages = advantages_of(make("mis", dialect="trl"), rollouts, signals)
    close(advantages[0], 1.4997001, 1e-7)
    found = coefficients_of(make("mis", dialect="trl"), rollouts, signals)
    close(found, advantages * torch.tensor([[2.9], [0.0], [1e-3], [1.0]]) / 4, 1e-6)


def test_icepop_drops_tokens_of_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("mis")
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(weight=None)))
    dropped = (found == 0) & (plain != 0)
    assert 0 < int(dropped.sum()) < int((plain != 0).sum())


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie below"):
        mis(GAP, ZERO, MASK, minimum=3.0)
