"""Attention entropy: its range, the two averages, subsets and soft weights, and the geometry of gradients."""

from __future__ import annotations

import math
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
    vector,
)
from tokenloom.methods.policy_optimization.attention_entropy import (
    Geometry,
    attention_entropy,
    direction_variance,
    gradient_geometry,
    metric,
    soft_weights,
    subset,
    token_entropies,
)


def signal_of(maps: Tensor, prompt: int) -> Tensor:
    """[T, 3] from the maps [H, S, S] of one layer."""
    entropies = torch.special.entr(maps).sum(-1).mean(0)
    mask = torch.ones(maps.shape[-1] - prompt, dtype=torch.bool)
    return attention_entropy(maps.mean(0), entropies, mask, prompt)


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf")).softmax(-1)


def entropies(*values: float) -> Tensor:
    """A signal [1, T, 3] with the same value for both averages, far below its limit."""
    x = row(*values)
    return torch.stack([x, x, torch.full_like(x, 10.0)], -1)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_defaults() -> None:
    assert defaults("attention-entropy") == {"lam": 0.5, "average": "heads", "normalized": False}
    assert defaults("attention-entropy/subset") == {
        "of": "anchors", "fraction": 0.2, "average": "heads", "normalized": False,
    }  # fmt: skip
    assert preset_defaults("attention-entropy")["train_on"] == "all"


def test_what_it_needs() -> None:
    for train_on in ("all", "anchors", "control"):
        algorithm = make("attention-entropy", train_on=train_on)
        assert algorithm.loss_needs == {"logprobs"}
        assert algorithm.needs == {"attention_entropy"}
        assert algorithm.rollout_needs == frozenset()


# -- the metric


def test_uniform_and_pointed_attention() -> None:
    size, prompt = 9, 3
    uniform = signal_of(causal(torch.zeros(2, size, size, dtype=torch.float64)), prompt)
    # The first response token is predicted from position 2, which sees three tokens.
    seen = torch.arange(3, 9, dtype=torch.float64)
    close(uniform, seen.log()[:, None].expand(6, 3))
    close(token_entropies(uniform[None], ones(1, 6), normalized=True), 1.0)
    pointed = torch.zeros(2, size, size, dtype=torch.float64)
    pointed[:, :, 0] = 1.0
    close(signal_of(pointed, prompt)[:, :2], 0.0)


def test_entropies_stay_below_their_limit_and_means_of_maps_are_wider() -> None:
    maps = causal(3 * torch.randn(4, 30, 30, generator=draw(), dtype=torch.float64))
    found = signal_of(maps, 5)
    assert bool((found[:, 0] <= found[:, 1]).all())
    assert bool((found[:, 1] <= found[:, 2] + 1e-12).all())
    assert float((found[:, 1] - found[:, 0]).min()) > 0.01
    normalized = token_entropies(found[None], ones(1, 25), normalized=True)
    assert 0.0 <= float(normalized.min()) <= float(normalized.max()) <= 1.0
    close(normalized[0], found[:, 0] / found[:, 2])
    same = maps[:1].expand(4, -1, -1)
    close(signal_of(same, 5)[:, 0], signal_of(same, 5)[:, 1])


def test_a_token_that_sees_one_token_has_no_entropy() -> None:
    found = signal_of(causal(torch.zeros(1, 3, 3, dtype=torch.float64)), 1)
    close(token_entropies(found[None], ones(1, 2), normalized=True), row(0.0, 1.0))
    # Without a prompt nothing predicts the first token; the second one is predicted from the first position.
    close(signal_of(causal(torch.zeros(1, 3, 3, dtype=torch.float64)), 0)[:, 2], vector(1, 1, 2).log())


def test_metric_means() -> None:
    mask = torch.tensor([[True, True, False]])
    x = torch.stack([row(1, 2, 99), row(2, 3, 99), row(4, 4, 99)], -1)
    found = metric(x, mask)
    close(torch.stack([found["heads"], found["map"], found["normalized"]]), vector(1.5, 2.5, 0.375))
    assert float(metric(x, mask & False)["heads"]) == 0.0


# -- soft weights


def test_soft_weights_worked_by_hand() -> None:
    # Ranks 0.5, 0, 1: 1 + lam (1 - 2 rank).
    close(soft_weights(entropies(0.3, 0.1, 2.0), ones(1, 3)), row(1, 1.5, 0.5))
    close(soft_weights(entropies(0.3, 0.1, 2.0), ones(1, 3), lam=-0.5), row(1, 0.5, 1.5))
    # Cut at zero: 1, 3, 0 before they are divided by 4/3.
    close(soft_weights(entropies(0.3, 0.1, 2.0), ones(1, 3), lam=2.0), row(0.75, 2.25, 0.0))
    mask = torch.tensor([[True, False, True]])
    close(soft_weights(entropies(0.3, 0.1, 2.0), mask), row(1.5, 0, 0.5))


def test_ties_share_their_rank() -> None:
    close(soft_weights(entropies(0.3, 0.3, 0.3), ones(1, 3), lam=1.0), 1.0)
    # Ranks 0, 1/2, 1/2, 1 of three steps: 0, 1.5, 1.5, 3 thirds.
    close(soft_weights(entropies(0.1, 0.3, 0.3, 2.0), ones(1, 4), lam=1.0), row(2, 1, 1, 0))


@pytest.mark.parametrize("lam", [-5.0, -1.0, 0.0, 0.5, 1.0, 3.0])
def test_soft_weights_have_mean_one_in_every_row(lam: float) -> None:
    rollouts, signals = synthetic_batch()
    found = soft_weights(signals.extras["attention_entropy"], rollouts.mask, lam=lam)
    mask = rollouts.mask
    close((found.sum(-1) / mask.sum(-1).clamp(min=1))[mask.any(-1)], 1.0)
    assert float(found.min()) >= 0.0
    # A row with a single sampled token.
    close(found[mask & (mask.sum(-1) == 1)[:, None]], 1.0)
    if lam == 0:
        close(found, mask.double())


def test_soft_weights_fall_with_entropy() -> None:
    values = torch.randn(1, 20, generator=draw(), dtype=torch.float64).abs()
    found = soft_weights(entropies(*values[0].tolist()), ones(1, 20))
    assert bool((found[0, values[0].argsort()].diff() < 0).all())


def test_average_and_normalization_are_read() -> None:
    x = torch.stack([row(1.0, 2.0), row(2.5, 2.1), row(2.6, 30.0)], -1)
    assert soft_weights(x, ones(1, 2))[0].argmax() == 0
    assert soft_weights(x, ones(1, 2), average="map")[0].argmax() == 1
    assert soft_weights(x, ones(1, 2), normalized=True)[0].argmax() == 1


# -- subsets


def choose(values: Tensor, mask: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    return subset(values, mask, torch.Generator().manual_seed(seed), **settings)


def test_subsets_worked_by_hand() -> None:
    x, mask = entropies(0.5, 0.1, 0.9, 0.3, 0.7), ones(1, 5)
    close(choose(x, mask), row(0, 1, 0, 0, 0))
    close(choose(x, mask, of="explorers"), row(0, 0, 1, 0, 0))
    close(choose(x, mask, fraction=0.4), row(0, 1, 0, 1, 0))
    close(choose(x, mask, of="explorers", fraction=0.4), row(0, 0, 1, 0, 1))
    close(choose(x, mask, fraction=1.0), 1.0)
    inner = torch.tensor([[True, False, False, True, True]])
    close(choose(x, inner), row(0, 0, 0, 1, 0))
    close(choose(x, inner, of="explorers"), row(0, 0, 0, 0, 1))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_anchors_and_explorers_are_disjoint(fraction: float, tied: bool) -> None:
    for length in range(1, 23):
        x = torch.rand(1, length, generator=draw(), dtype=torch.float64)
        signal = entropies(*([0.5] * length if tied else x[0].tolist()))
        anchors, explorers, control = (
            choose(signal, ones(1, length), of=of, fraction=fraction) for of in ("anchors", "explorers", "control")
        )
        assert not bool((anchors * explorers).any())
        number = max(int(fraction * length + 1e-6), int(length > 1))
        assert anchors.sum() == explorers.sum() == control.sum() == number
        if not tied and number:
            assert float(x[anchors > 0].max()) < float(x[explorers > 0].min())


def test_the_control_is_a_uniform_draw() -> None:
    x, mask = entropies(*range(10)), ones(1, 10)
    counts = sum((choose(x, mask, seed, of="control", fraction=0.3) for seed in range(2000)), torch.zeros(()))
    # Each token is drawn with probability 0.3: 600 of 2000 with a deviation of 20.5; five of them.
    assert float((counts - 600).abs().max()) < 103
    # Padding does not move the draws.
    wide = torch.nn.functional.pad(x, (0, 0, 0, 4))
    found = choose(wide, torch.nn.functional.pad(mask, (0, 4)), of="control")
    close(found[:, :10], choose(x, mask, of="control"))


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        choose(entropies(1.0), ones(1), fraction=fraction)


# -- the preset


def test_without_strength_it_is_grpo_with_the_token_mean() -> None:
    rollouts, signals = synthetic_batch()
    grpo = coefficients_of(make("grpo", kl_coef=0.0).override(aggregate="token-mean"), rollouts, signals)
    close(coefficients_of(make("attention-entropy", lam=0.0), rollouts, signals), grpo)
    whole = make("attention-entropy", train_on="explorers", fraction=1.0)
    close(coefficients_of(whole, rollouts, signals), grpo)
    found = coefficients_of(make("attention-entropy"), rollouts, signals)
    assert not torch.allclose(found, grpo, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("of", ["anchors", "explorers", "control"])
def test_the_two_normalizers_differ_by_the_share_trained_on(of: str) -> None:
    rollouts, signals = synthetic_batch()
    algorithms = [make("attention-entropy", train_on=of, normalizer=n) for n in ("selected", "all")]
    selected, every = (coefficients_of(a, rollouts, signals) for a in algorithms)
    weights = algorithms[0].plan(rollouts, signals).values["weights"]
    close(selected * weights.sum(), every * rollouts.mask.sum())
    assert bool((every[weights == 0] == 0).all())
    assert int(weights.sum()) < 0.5 * int(rollouts.mask.sum())


def test_a_schedule_moves_from_anchors_to_explorers() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("attention-entropy", lam={"schedule": "linear", "start": 0.5, "end": -0.1})
    for step, lam in ((0, 0.5), (99, -0.1)):
        weights = algorithm.plan(rollouts, signals, step=step, total_steps=100).values["weights"]
        wanted = soft_weights(signals.extras["attention_entropy"], rollouts.mask, lam=lam)
        # The last of 100 steps may stop a hundredth short of the end.
        close(weights, wanted, 0.0061)


# -- gradients


def test_geometry_worked_by_hand() -> None:
    whole = [vector(3, 0), vector(4)]
    found = gradient_geometry([vector(3, 0), vector(0)], whole)
    assert found == pytest.approx((0.6, 0.6))
    assert gradient_geometry([2 * x for x in whole], whole) == pytest.approx((1.0, 2.0))
    assert gradient_geometry([-x for x in whole], whole) == pytest.approx((-1.0, 1.0))
    assert gradient_geometry([vector(0, 1), vector(0)], whole) == pytest.approx((0.0, 0.2))
    assert gradient_geometry([0 * x for x in whole], whole) == Geometry(0.0, 0.0)
    with pytest.raises(ValueError, match="shapes"):
        gradient_geometry(whole[:1], whole)


def test_variance_of_directions() -> None:
    assert direction_variance(vector(1, 2, 3).expand(4, 3)) == pytest.approx(0.0, abs=1e-12)
    # Lengths do not matter, opposite directions cancel.
    assert direction_variance(torch.tensor([[1.0, 0.0], [-9.0, 0.0]])) == pytest.approx(1.0)
    assert direction_variance(torch.tensor([[5.0, 0.0], [0.0, 0.1]])) == pytest.approx(0.5)
    units = torch.nn.functional.normalize(torch.randn(7, 5, generator=draw(), dtype=torch.float64), dim=-1)
    spread = ((units - units.mean(0)) ** 2).sum(-1).mean()
    assert direction_variance(3 * units) == pytest.approx(float(spread))
    assert math.isclose(direction_variance(torch.zeros(2, 3)), 1.0)
