"""DelTA: its algorithm written out as loops, mean weight 1, and what one-sided or equal tokens get."""

from __future__ import annotations

import math

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
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.delta_credit import discriminative, head_inputs, token_weights


def test_defaults() -> None:
    expected = {"iterations": 1, "low": 0.8, "high": 1.2}
    assert defaults("delta-credit") == expected
    assert preset_defaults("delta-credit") == expected


def test_what_it_needs() -> None:
    algorithm = make("delta-credit")
    assert algorithm.loss_needs == {"logprobs"}
    assert algorithm.needs == {"head_inputs", "old_logprobs"}


def draw(seed: int = 0, number: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(number, generator=g, dtype=torch.float64)
    advantages[3] = 0.0
    return (
        advantages,
        torch.randn(number, 5, generator=g, dtype=torch.float64),
        -torch.rand(number, generator=g, dtype=torch.float64),
    )


def written_out(a: Tensor, h: Tensor, logprobs: Tensor, rounds: int, low: float, high: float) -> list[float]:
    """The sheet's steps with explicit distances, one token at a time."""
    number = len(a)
    v = [(1 - math.exp(float(logprobs[i]))) * h[i] for i in range(number)]
    side = {+1: [i for i in range(number) if a[i] > 0], -1: [i for i in range(number) if a[i] < 0]}

    def center(s: int, q: list[float]) -> Tensor:
        total = sum(q[i] * abs(float(a[i])) for i in side[s])
        return sum((q[i] * abs(float(a[i])) * v[i] for i in side[s]), torch.zeros(())) / total

    def margins(up: Tensor, down: Tensor) -> list[float]:
        sides = [(up, down) if a[i] > 0 else (down, up) for i in range(number)]
        return [float(((v[i] - other) ** 2).sum() - ((v[i] - own) ** 2).sum()) for i, (own, other) in enumerate(sides)]

    def spreads(m: list[float]) -> dict[int, float]:
        means = {s: sum(m[i] for i in side[s]) / len(side[s]) for s in side}
        return {s: math.sqrt(max(sum((m[i] - means[s]) ** 2 for i in side[s]) / len(side[s]), 1e-8)) for s in side}

    def shares(m: list[float], gamma: dict[int, float]) -> list[float]:
        return [1 / (1 + math.exp(-m[i] / gamma[1 if a[i] > 0 else -1])) for i in range(number)]

    m = margins(center(1, [1.0] * number), center(-1, [1.0] * number))
    gamma = spreads(m)
    for _ in range(rounds):
        q = shares(m, gamma)
        gamma = spreads(m)
        m = margins(center(1, q), center(-1, q))
    w = [low if a[i] == 0 else low + (high - low) * x for i, x in enumerate(shares(m, gamma))]
    return [x * number / sum(w) for x in w]


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_steps_written_out(rounds: int, seed: int) -> None:
    a, h, logprobs = draw(seed)
    found = token_weights(a, h, logprobs, iterations=rounds, low=0.5, high=1.7)
    close(found, written_out(a, h, logprobs, rounds, 0.5, 1.7))


def test_rounds_matter() -> None:
    a, h, logprobs = draw()
    found = [token_weights(a, h, logprobs, iterations=k, low=0.8, high=1.2) for k in range(3)]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_weights_have_mean_one_and_stay_in_range() -> None:
    for seed in range(5):
        a, h, logprobs = draw(seed, 30)
        found = token_weights(a, 5 * h, logprobs, iterations=1, low=0.8, high=1.2)
        close(found.mean(), 1.0)
        # Undo the division: a token without advantage sits at the lower end.
        raw = found * 0.8 / found[3]
        assert float(raw.min()) >= 0.8 - 1e-12
        assert float(raw.max()) <= 1.2 + 1e-12


def test_equal_tokens_weigh_the_same() -> None:
    v = torch.tensor([3.0, -100.0, 7.0])
    h, logprobs = v.expand(6, 3), torch.full((6,), -1.0)
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor([1.0, 0.3, 1.0, -0.7, -0.7, -0.2], dtype=dtype)
        found = token_weights(a, h.to(dtype), logprobs.to(dtype), iterations=2, low=0.8, high=1.2)
        close(found, 1.0, 1e-9 if dtype == torch.float64 else 1e-5)
    with_zero = token_weights(vector(1, 0, -1), h[:3].double(), logprobs[:3].double(), iterations=1, low=0.8, high=1.2)
    # Shares of 1/2 weigh 1, the row without advantage 0.8.
    close(with_zero, vector(1, 0.8, 1) * 3 / 2.8)


def test_a_certain_token_has_no_gradient_and_no_place() -> None:
    a, h, logprobs = draw()
    certain = logprobs.clone()
    certain[0] = 0.0
    moved = h.clone()
    moved[0] = 1000.0
    settings = {"iterations": 1, "low": 0.8, "high": 1.2}
    close(token_weights(a, moved, certain, **settings), token_weights(a, h, certain, **settings))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_side_alone_has_nothing_to_part(sign: int) -> None:
    a, h, logprobs = draw()
    close(token_weights(sign * a.abs(), h, logprobs, iterations=1, low=0.8, high=1.2), 1.0)


def test_tokens_that_set_their_side_apart_weigh_more_than_shared_ones() -> None:
    g = torch.Generator().manual_seed(0)
    h = 0.1 * torch.randn(20, 5, 8, generator=g, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10)
    h[:, 0, 0] += 3 * sign
    advantages = sign[:, None].expand(20, 5)
    mask = ones(20, 5)
    old = torch.full((20, 5), -1.0).double()
    weights = discriminative(advantages, h, old, mask) / advantages
    close(weights.mean(), 1.0)
    assert float(weights[:, 0].min()) > 1.1
    assert float(weights[:, 1:].max()) < 1.05
    assert float(weights[:, 1:].mean()) < 0.97
    # Swapping the sides swaps nothing.
    close(discriminative(-advantages, h, old, mask), -discriminative(advantages, h, old, mask))


def test_the_signal_is_the_state_itself() -> None:
    low = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert head_inputs(low).dtype == torch.float32
    assert head_inputs(low.double()).dtype == torch.float64
    close(head_inputs(low), low.float())


@pytest.mark.parametrize(
    "settings", [{"low": 1.3}, {"low": -0.1}, {"low": 0.0, "high": 0.0}, {"iterations": -1}], ids=str
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="low <= high"):
        discriminative(torch.ones(1, 1), torch.ones(1, 1, 2), torch.zeros(1, 1), ones(1), **settings)  # type: ignore[arg-type]


def test_equal_limits_are_dapo() -> None:
    rollouts, signals = synthetic_batch()
    dapo = coefficients_of(make("dapo"), rollouts, signals)
    close(coefficients_of(make("delta-credit", low=1.0, high=1.0), rollouts, signals), dapo)
    close(coefficients_of(make("delta-credit", low=0.3, high=0.3), rollouts, signals), dapo)
    assert not torch.allclose(coefficients_of(make("delta-credit"), rollouts, signals), dapo, rtol=1e-6, atol=1e-9)
