"""GSPO: one length-normalized ratio for a response."""

from __future__ import annotations

import math

import pytest
import torch

from methods.policy_optimization.batch import (
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
)
from tokenloom.methods.policy_optimization.gspo import gspo, sequence_log_ratio
from tokenloom.methods.policy_optimization.token_ratio import token_ratio


def test_defaults() -> None:
    assert defaults("gspo") == {"normalize": True, "limit": 10.0}
    assert preset_defaults("gspo") == {"dialect": "paper", "low": 3e-4, "high": 4e-4}
    algorithm = make("gspo")
    assert (algorithm.terms, algorithm.aggregate.part.name) == ((), "sequence-mean")


def test_worked_numbers() -> None:
    close(gspo(row(0.2, 0.1), row(0.0, 0.0), ones(1, 2)).exp(), 1.161834, 1e-6)
    close(gspo(row(0.2, 0.1), row(0.0, 0.0), ones(1, 2), normalize=False), 0.3)


def test_mean_over_sampled_tokens_only() -> None:
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    logprobs = torch.tensor([[0.4, 99.0, 0.2, float("nan")], [5.0] * 4])
    close(gspo(logprobs, torch.zeros(2, 4), mask), [[0.3, 0.0, 0.3, 0.0], [0.0] * 4], 1e-6)


def test_every_token_moves_every_entry() -> None:
    def first_entry(logprobs: torch.Tensor) -> torch.Tensor:
        return gspo(logprobs, row(0, 0, 0, 0), ones(1, 4))[:, :1]

    close(gradient(first_entry, row(0.1, 0.2, 0.3, 0.4))[0], 0.25)


def test_one_token_is_the_token_ratio() -> None:
    logprobs, old = row(-0.7), row(-1.1)
    close(gspo(logprobs, old, ones(1)), token_ratio(logprobs, old, ones(1)))


def test_log_ratio_is_limited_from_above_only() -> None:
    assert sequence_log_ratio(row(24.0, 0.0), row(0, 0), ones(1, 2)).item() == 10
    assert sequence_log_ratio(row(-24.0, 0.0), row(0, 0), ones(1, 2)).item() == -12
    (slope,) = gradient(lambda x: gspo(x, row(0, 0), ones(1, 2)), row(24.0, 0.0))
    close(slope, 0.0)


@pytest.mark.parametrize(
    ("mean", "clipped"),
    [(3.9e-4, (False, False)), (4.1e-4, (True, False)), (-2.9e-4, (False, False)), (-3.1e-4, (False, True))],
)
def test_clip_drops_whole_responses(mean: float, clipped: tuple[bool, bool]) -> None:
    # Row 0 has A > 0 and row 1 has A < 0, both with this mean log-ratio spread unevenly over two tokens.
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 1]])
    found = coefficients_of(make("gspo"), rollouts, signals_of(rollouts, torch.tensor([mean + 0.5, mean - 0.5])))
    share = 0.7071058 * math.exp(mean) / 4
    close(found[0], 0.0 if clipped[0] else share, 1e-6)
    close(found[1], 0.0 if clipped[1] else -share, 1e-6)


def test_coefficient_is_ratio_times_advantage_over_rows_and_length() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 0, 0]])
    algorithm = make("gspo", low=0.5, high=0.5)
    signals = signals_of(rollouts, torch.tensor([[0.3, 0.0, 0.0], [-0.2, 0.0, 0.0]]))
    a = advantages_of(algorithm, rollouts, signals)[0, 0]
    found = coefficients_of(algorithm, rollouts, signals)
    close(found[0], math.exp(0.1) * a / 6, 1e-7)
    close(found[1], torch.stack([-math.exp(-0.2) * a / 2, 0 * a, 0 * a]), 1e-7)


def test_trl_counts_empty_rows_and_divides_by_a_larger_epsilon() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0], mask=[[1, 1], [1, 0], [0, 0]])
    paper, trl = (make("gspo", dialect=d).plan(rollouts, signals_of(rollouts)).values for d in ("paper", "trl"))
    close(paper["scale"], [[0.25, 0.25], [0.5, 0], [0, 0]])
    close(trl["scale"], [[1 / 6, 1 / 6], [1 / 3, 0], [0, 0]], 1e-7)
    close(trl["advantages"][0], 2 / 3 / (0.5773503 + 1e-4), 1e-7)
