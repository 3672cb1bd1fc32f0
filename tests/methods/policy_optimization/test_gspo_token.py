"""GSPO-token: GSPO's value, each token's own gradient."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    gradient,
    make,
    ones,
    preset_defaults,
    row,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.gspo_token import gspo_token


def test_defaults() -> None:
    assert defaults("gspo-token") == {"limit": 10.0}
    assert preset_defaults("gspo-token") == {"low": 3e-4, "high": 4e-4}


def test_value_of_the_row_and_gradient_of_the_token() -> None:
    close(gspo_token(row(0.2, 0.1), row(0, 0), ones(1, 2)).exp(), 1.161834, 1e-6)
    mask = torch.tensor([[True, False, True]])
    logprobs = row(0.4, float("nan"), 0.2)
    close(gspo_token(logprobs, row(0, 0, 0), mask), [[0.3, 0.0, 0.3]])
    close(gradient(lambda x: gspo_token(x, row(0, 0, 0), mask), logprobs)[0], [[1.0, 0.0, 1.0]])


def test_value_is_exact_next_to_a_tight_clip() -> None:
    # Adding a log-prob of -9 and taking it away again would round 1e-4 by up to 1e-6 in float32; the clip is 3e-4.
    old = torch.full((1, 64), -9.0) - torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    logprobs = old + 2.0**-13
    logprobs[0, 0] += 2.0**-17
    assert bool((gspo_token(logprobs, old, ones(1, 64)) == 2.0**-13 + 2.0**-23).all())


def test_beyond_the_limit_the_gradient_is_zero() -> None:
    close(gspo_token(row(24.0, 0.0), row(0, 0), ones(1, 2)), 10.0)
    close(gradient(lambda x: gspo_token(x, row(0, 0), ones(1, 2)), row(24.0, 0.0))[0], 0.0)


@pytest.mark.parametrize("width", [3e-4, 0.3, 5.0])
def test_same_gradient_as_gspo_for_a_row_constant_advantage(width: float) -> None:
    rollouts, signals = synthetic_batch()
    bounds = {"low": min(width, 1.0), "high": width}
    one, two = (coefficients_of(make(slug, **bounds), rollouts, signals) for slug in ("gspo", "gspo-token"))
    close(one, two)
    assert bool(one.abs().sum() > 0)


def test_token_advantages_stay_with_their_tokens() -> None:
    rollouts, signals = synthetic_batch()
    base = make("gspo-token", low=0.9, high=9.0).override(advantage="reinforce-pp", reward=["kl/in-reward"])
    apart = coefficients_of(base, rollouts, signals)
    shared = coefficients_of(base.override(log_ratio="gspo"), rollouts, signals)
    close(apart.sum(-1), shared.sum(-1))
    assert not torch.allclose(apart, shared)
