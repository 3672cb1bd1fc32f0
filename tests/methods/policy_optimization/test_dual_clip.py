"""Dual clip: large ratios of negative advantages lose their gradient too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from methods.policy_optimization.batch import (
    INF,
    advantages_of,
    close,
    coefficients_of,
    gradient,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.dual_clip import dual_clip
from tokenloom.methods.policy_optimization.ppo_clip import ppo_clip


def test_defaults() -> None:
    assert preset_defaults("dual-clip") == {"dialect": "verl", "cap": None}


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (5.0, -1.0, -3.0, 0.0),
        (2.0, -1.0, -2.0, -2.0),
        (0.5, -1.0, -0.8, 0.0),
        (5.0, 1.0, 1.2, 0.0),
        (0.5, 1.0, 0.5, 0.5),
        (5.0, 0.0, 0.0, 0.0),
        (2.9, -2.0, -5.8, -5.8),
        (3.1, -2.0, -6.0, 0.0),
    ],
)
def test_worked_numbers(ratio: float, advantage: float, objective: float, slope: float) -> None:
    log_ratio = row(ratio).log()
    close(dual_clip(log_ratio, row(advantage), ones(1)), objective)
    close(gradient(lambda x: dual_clip(x, row(advantage), ones(1)), log_ratio)[0], slope)


def test_an_infinite_cap_is_ppo_at_zero_advantage_too() -> None:
    log_ratio, advantages = row(0.1, 5.0, 9.0, 1.0, 50.0).log(), row(-1.0, -1.0, 0.0, 0.0, 2.0)
    dual = partial(dual_clip, advantages=advantages, mask=ones(1, 5), lo=0.8, hi=1.2, cap=INF)
    plain = partial(ppo_clip, advantages=advantages, mask=ones(1, 5), lo=0.8, hi=1.2)
    close(dual(log_ratio), plain(log_ratio))
    close(gradient(dual, log_ratio)[0], gradient(plain, log_ratio)[0])


def test_tensor_caps() -> None:
    found = dual_clip(row(5.0, 5.0).log(), row(-1.0, -1.0), ones(1, 2), 0.8, 1.2, row(3.0, 4.0))
    close(found, [[-3.0, -4.0]])


@pytest.mark.parametrize(("dialect", "kept", "dropped"), [("verl", 2.9, 3.1), ("trl", 3.9, 4.1)])
def test_cap_of_the_dialects(dialect: str, kept: float, dropped: float) -> None:
    rollouts = rollouts_of([2.0, 0.0, 0.0])
    algorithm = make("dual-clip", dialect=dialect)
    signals = signals_of(rollouts, row(1.0, kept, dropped).log().T)
    advantages = advantages_of(algorithm, rollouts, signals)
    found = coefficients_of(algorithm, rollouts, signals)
    close(found[1], kept * advantages[1] / 3)
    close(found[2], 0.0)
    moved = coefficients_of(make("dual-clip", dialect=dialect, cap=10.0), rollouts, signals)
    close(moved[2], dropped * advantages[2] / 3)


def test_epsilon_of_the_dialects() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0])
    close(advantages_of(make("dual-clip", dialect="trl"), rollouts)[0], 1.4997001, 1e-7)
    close(advantages_of(make("dual-clip", dialect="verl"), rollouts)[0], 1.4999970, 1e-7)


def test_preset_without_a_cap_is_grpo_under_ppos_clip() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    far = signals.replace(
        old_logprobs=signals.logprobs - 3 * torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).double()
    )
    dual = make("dual-clip")
    plain = dual.override(surrogate="ppo-clip")
    capped, uncapped = (coefficients_of(a, rollouts, far) for a in (dual, plain))
    assert not torch.allclose(capped, uncapped)
    close(coefficients_of(dual.override(bounds={"cap": None}), rollouts, far), uncapped)
