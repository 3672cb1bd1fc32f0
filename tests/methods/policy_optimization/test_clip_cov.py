"""Clip-Cov: a few random tokens of high covariance lose their gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    row,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.clip_cov import clip_cov, covariance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_loop(
    advantages: Tensor, logprobs: Tensor, ratio: Tensor, mask: Tensor, seed: int, *, k: float, lb: float, ub: float
) -> Tensor:
    """The rule token by token, in plain Python: its own statement of what verl does."""
    places = [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if bool(mask[i, t])]
    mean_a = sum(float(advantages[p]) for p in places) / len(places)
    mean_lp = sum(float(logprobs[p]) for p in places) / len(places)
    candidates = []
    for p in places:
        a, r = float(advantages[p]), float(ratio[p])
        gain, clipped_gain = a * r, a * min(max(r, 0.8), 1.2)
        if not clipped_gain < gain and lb < (a - mean_a) * (float(logprobs[p]) - mean_lp) < ub:
            candidates.append(p)
    weights = mask.to(logprobs.dtype)
    for at in torch.randperm(len(candidates), generator=generator(seed))[: max(int(k * len(places)), 1)].tolist():
        weights[candidates[at]] = 0
    return weights


def random_tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = generator(seed)
    mask = torch.rand(6, 20, generator=g) > 0.3
    advantages = 2 * torch.randn(6, 20, generator=g).double()
    logprobs = -torch.randn(6, 20, generator=g).double().abs() * 2
    ratio = torch.exp(0.3 * torch.randn(6, 20, generator=g).double())
    return advantages, logprobs, ratio, mask


def test_defaults() -> None:
    expected = {"k": 2e-4, "lb": 1.0, "ub": 5.0}
    assert defaults("clip-cov") == expected
    assert preset_defaults("clip-cov") == expected


def test_covariance_worked_numbers() -> None:
    # Means 1 and -2 over the first three; the fourth is off the mask.
    mask = torch.tensor([[True, True, True, False]])
    found = covariance(row(3.0, 0.0, 0.0, 100.0), row(-1.0, -2.0, -3.0, -50.0), mask)
    close(found, [[2.0, 0.0, 1.0, 0.0]])


@pytest.mark.parametrize("k", [2e-4, 0.02, 0.1, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_loop_with_the_same_generator(k: float, seed: int) -> None:
    advantages, logprobs, ratio, mask = random_tokens(seed)
    found = clip_cov(advantages, logprobs, ratio, mask, generator(seed), k=k, lb=0.5, ub=6.0)
    assert torch.equal(found, by_loop(advantages, logprobs, ratio, mask, seed, k=k, lb=0.5, ub=6.0))
    dropped = int((mask & (found == 0)).sum())
    assert 1 <= dropped <= max(int(k * int(mask.sum())), 1)


def test_bounds_are_strict_and_clipped_tokens_are_no_candidates() -> None:
    # cov: 2, 0, 1 and a mean of advantages and log-probs as above; k = 1 drops every candidate.
    advantages, logprobs, one = row(3.0, 0.0, 0.0), row(-1.0, -2.0, -3.0), row(1.0, 1.0, 1.0)
    drop_all: dict[str, Any] = {"k": 1.0}
    assert clip_cov(advantages, logprobs, one, ones(1, 3), generator(), **drop_all).tolist() == [[0, 1, 1]]
    assert clip_cov(advantages, logprobs, one, ones(1, 3), generator(), lb=0.9, ub=2.0, **drop_all).tolist() == [
        [1, 1, 0]
    ]
    clipped = clip_cov(advantages, logprobs, row(1.3, 1.0, 1.3), ones(1, 3), generator(), lb=0.9, **drop_all)
    assert clipped.tolist() == [[1, 1, 0]]  # A = 0 is not clipped by a ratio of 1.3


def test_no_candidate_is_ppo() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("clip-cov", lb=1e6, ub=1e7)
    close(
        coefficients_of(algorithm, rollouts, signals),
        coefficients_of(algorithm.override(weight=None), rollouts, signals),
    )
    off = make("clip-cov", k=0.0, lb=0.0)
    close(coefficients_of(off, rollouts, signals), coefficients_of(off.override(weight=None), rollouts, signals))


def test_preset_zeroes_tokens_of_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("clip-cov", k=0.05, lb=0.1)
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(weight=None)))
    changed = found != plain
    assert int(changed.sum()) == int(0.05 * int(rollouts.mask.sum()))
    assert bool((found[changed] == 0).all())


def test_same_generator_same_tokens() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("clip-cov", k=0.05, lb=0.1)
    one, two = (coefficients_of(algorithm, rollouts, signals) for _ in range(2))
    assert torch.equal(one, two)
    advantages, logprobs, ratio, mask = random_tokens(0)
    drawn = {tuple(clip_cov(advantages, logprobs, ratio, mask, generator(s)).reshape(-1).tolist()) for s in range(8)}
    assert len(drawn) > 1


@pytest.mark.parametrize("wrong", [{"lb": 5.0, "ub": 5.0}, {"k": -0.1}, {"k": 1.1}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="clip-cov needs"):
        clip_cov(row(1.0), row(-1.0), row(1.0), ones(1), generator(), **wrong)
