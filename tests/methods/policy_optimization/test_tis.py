"""TIS: truncated weights for the sampler's mismatch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    INF,
    NAN,
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
)
from tokenloom.methods.policy_optimization.tis import mismatch_ratio, tis

MASK = torch.tensor([[True, True, False], [True, True, True]])
GAP = torch.tensor([[4.0, 0.25, 77.0], [1.5, 0.5, 1.0]], dtype=torch.float64).log()
"""Token ratios: rows multiply to 1 and 0.75."""
ZERO = torch.zeros(2, 3, dtype=torch.float64)


def test_defaults() -> None:
    assert defaults("tis") == {"level": "token", "minimum": None, "maximum": 2.0, "normalize": False}
    assert preset_defaults("tis") == {"level": "token", "maximum": 2.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[2.0, 0.25, 0], [1.5, 0.5, 1.0]]),
        ({"minimum": 0.4, "maximum": 1.2}, [[1.2, 0.4, 0], [1.2, 0.5, 1.0]]),
        ({"maximum": None}, [[4.0, 0.25, 0], [1.5, 0.5, 1.0]]),
        ({"level": "sequence"}, [[1.0, 1.0, 0], [0.75] * 3]),
        ({"level": "sequence", "maximum": 0.8}, [[0.8, 0.8, 0], [0.75] * 3]),
        ({"level": "sequence", "minimum": 0.9, "maximum": None}, [[1.0, 1.0, 0], [0.9] * 3]),
    ],
)
def test_worked_numbers(settings: dict[str, Any], expected: list[list[float]]) -> None:
    close(tis(GAP, ZERO, MASK, **settings), expected)


def test_sequence_level_is_the_product_before_truncation() -> None:
    token = mismatch_ratio(GAP, ZERO, MASK, "token")
    sequence = mismatch_ratio(GAP, ZERO, MASK, "sequence")
    close(sequence[:, 0], torch.where(MASK, token, torch.ones_like(token)).prod(-1))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_missing_sampler_log_prob_counts_as_ratio_one(level: Any) -> None:
    sampler = torch.tensor([[NAN, 0.0, 0.0], [NAN, NAN, NAN]], dtype=torch.float64)
    found = tis(GAP, sampler, MASK, level=level)
    row_zero = [1.0, 0.25, 0] if level == "token" else [0.25, 0.25, 0]
    close(found, [row_zero, [1.0] * 3])


def test_normalization_is_over_tokens_or_over_rows() -> None:
    # Tokens: (2 + 0.25 + 1.5 + 0.5 + 1) / 5 = 1.05. Rows: (1 + 0.75) / 2 = 0.875, whatever their lengths.
    close(tis(GAP, ZERO, MASK, normalize=True), tis(GAP, ZERO, MASK) / 1.05)
    close(tis(GAP, ZERO, MASK, normalize=True, level="sequence"), tis(GAP, ZERO, MASK, level="sequence") / 0.875)
    with_empty = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
    padded = torch.cat([GAP, GAP[:1]])
    found = tis(padded, torch.zeros(3, 3).double(), with_empty, normalize=True, level="sequence")
    close(found[:2], tis(GAP, ZERO, MASK, level="sequence") / 0.875)
    close(found[2], 0.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weight", ["tis", "mis"])
def test_equal_engines_change_nothing(weight: str, level: str) -> None:
    rollouts, signals = synthetic_batch()
    same = rollouts.replace(sampler_logprobs=signals.old_logprobs)
    algorithm = make("tis").override(weight=[{"part": weight, "level": level, "normalize": True}])
    found, plain = (coefficients_of(a, same, signals) for a in (algorithm, algorithm.override(weight=None)))
    assert torch.equal(found, plain)


def test_weights_are_detached_and_spare_the_kl() -> None:
    rollouts = rollouts_of(
        [1.0, 0.0], sampler_logprobs=torch.tensor([[-1 - math.log(1.5)], [-1 - math.log(8)]]).double()
    )
    signals = signals_of(rollouts, ref_logprobs=torch.full((2, 1), -1.5).double())
    algorithm = make("tis").with_term("kl", coef=0.1)
    pull = 0.1 * (1 - math.exp(-0.5)) / 2
    close(coefficients_of(algorithm, rollouts, signals), torch.tensor([[1.5], [-2.0]]) * 0.7071058 / 2 - pull, 1e-6)
    old = GAP.clone().requires_grad_()
    assert not tis(old, ZERO, MASK).requires_grad


def test_hostile_mismatch_stays_finite() -> None:
    found = tis(row(300.0, -300.0, INF), row(0.0, 0.0, 0.0), ones(1, 3), maximum=None)
    close(found, [[math.exp(20), math.exp(-20), math.exp(20)]])
    assert bool(tis(row(300.0, -1.0), row(0.0, -INF), ones(1, 2), level="sequence").isfinite().all())


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"minimum = 2\.0 must lie below maximum = 2\.0"):
        tis(GAP, ZERO, MASK, minimum=2.0)
