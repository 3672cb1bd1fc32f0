"""A3PO: extremes of probability are scaled, by the side of the answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
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
from tokenloom.methods.policy_optimization.a3po import a3po, by_entropy, extreme_tokens, polarity, weighted
from tokenloom.schedule import Schedule

OFF = {"positive_low": 1.0, "negative_high": 1.0}


def test_defaults() -> None:
    shared = {"ratio": 0.2, "threshold": 0.5}
    assert defaults("a3po") == shared | OFF | {
        "positive_low": 2.0,
        "negative_high": 2.0,
        "positive_high": 1.0,
        "negative_low": 1.0,
    }
    assert defaults("a3po/entropy") == shared | OFF | {"positive_high": 2.0, "negative_low": 2.0}
    assert defaults("a3po/polarity") == {"positive": 1.0, "negative": 1.0, "threshold": 0.5}
    assert defaults("a3po/weighted") == {"positive": 1.0, "negative": 1.0, "threshold": 0.5}
    assert preset_defaults("a3po") == {"base": "grpo", "metric": "probability", "ratio": 0.2, "scale": None}
    fall = Schedule("linear", 2.0, 1.0, steps=100)
    assert make("a3po").credit[0].params == {"ratio": 0.2, "positive_low": fall, "negative_high": fall}
    assert make("a3po", metric="entropy").credit[0].params == {
        "ratio": 0.2,
        "positive_high": fall,
        "negative_low": fall,
    }


def test_worked_rows() -> None:
    # Ten tokens and q = 0.2: two per row. The right row's least likely, the wrong row's most likely.
    logprobs = torch.arange(10.0, dtype=torch.float64).flip(0).neg().expand(2, 10)
    advantages = torch.tensor([[1.0], [-0.5]], dtype=torch.float64).expand(2, 10)
    found = a3po(advantages, vector(1.0, 0.0), logprobs, ones(2, 10))
    close(found, [[2.0, 2.0, *[1.0] * 8], [*[-0.5] * 8, -1.0, -1.0]])


@pytest.mark.parametrize("number", [1, 2, 4, 5, 9, 10, 14, 15, 29, 35, 100])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("largest", [False, True])
def test_number_of_tokens_chosen(number: int, ratio: float, largest: bool) -> None:
    metric = torch.rand(1, number, generator=torch.Generator().manual_seed(number))
    chosen = extreme_tokens(metric, ones(1, number), ratio, largest=largest)
    assert int(chosen.sum()) == max(1, int(number * ratio))
    if not bool(chosen.all()):
        edge = metric[chosen].min() if largest else metric[chosen].max()
        others = metric[~chosen]
        assert bool((others <= edge).all() if largest else (others >= edge).all())


def test_ties_go_to_the_earlier_token() -> None:
    for largest in (False, True):
        chosen = extreme_tokens(torch.zeros(1, 5), ones(1, 5), 0.4, largest=largest)
        assert chosen.tolist() == [[True, True, False, False, False]]


def test_only_sampled_tokens_are_counted_and_chosen() -> None:
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    metric = torch.tensor([[0.0, -INF, 0.3, 0.2, NAN], [INF] * 5])
    assert extreme_tokens(metric, mask, 0.7, largest=False).tolist() == [[True, False, False, True, False], [False] * 5]
    assert extreme_tokens(metric, mask, 0.2, largest=True).tolist() == [[False, False, True, False, False], [False] * 5]
    assert extreme_tokens(torch.zeros(2, 0), ones(2, 0), 0.2, largest=True).shape == (2, 0)


def test_zero_entropy_is_a_metric_like_any_other() -> None:
    # The released code would skip the two certain tokens and pick the third of the remaining three.
    entropies = torch.tensor([[0.0, 0.5, 0.0, 0.9, 0.2]])
    found = by_entropy(-ones(1, 5).float() + 0.0, torch.zeros(1), entropies, ones(1, 5), ratio=0.4, negative_low=3.0)
    close(found, [[-3.0, -1.0, -3.0, -1.0, -1.0]])


def test_each_rule_on_its_own_side_and_end() -> None:
    logprobs = torch.tensor([[-3.0, -1.0, -2.0]]).expand(3, 3)
    advantages, outcomes = torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, 3), torch.tensor([1.0, 0.0, NAN])
    for rule, place in (
        ("positive_low", (0, 0)),
        ("positive_high", (0, 1)),
        ("negative_low", (1, 0)),
        ("negative_high", (1, 1)),
    ):
        found = a3po(advantages, outcomes, logprobs, ones(3, 3), **OFF | {rule: 5.0})
        changed = (found / advantages - 1).nonzero().tolist()
        assert changed == [list(place)]
        assert found[place] == 5 * advantages[place]


def test_overlapping_rules_multiply() -> None:
    found = a3po(row(1.0), vector(1.0), row(-2.0), ones(1), positive_low=3.0, positive_high=0.5)
    close(found, 1.5)
    # Different shares: the part twice. Two of four get the first scale, one of them the second as well.
    rollouts = rollouts_of([1.0, 0.0], mask=[[1] * 4] * 2)
    signals = signals_of(rollouts, old_logprobs=row(-4, -3, -2, -1).expand(2, 4).clone())
    wide, narrow = ({"part": "a3po", **OFF, "ratio": q, "positive_low": s} for q, s in ((0.5, 2.0), (0.25, 3.0)))
    algorithm = make("grpo", kl_coef=0.0).override(credit=[wide, narrow])
    base = advantages_of(make("grpo"), rollouts, signals)
    close(advantages_of(algorithm, rollouts, signals), base * torch.cat([row(6, 2, 1, 1), row(1, 1, 1, 1)]))


def test_scale_one_is_the_identity() -> None:
    rollouts, signals = synthetic_batch()
    for metric in ("probability", "entropy"):
        found = coefficients_of(make("a3po", scale=1.0, metric=metric), rollouts, signals)
        assert torch.equal(found, coefficients_of(make("grpo", kl_coef=0.0), rollouts, signals))
    found = coefficients_of(make("a3po", scale=1.0, base="dapo"), rollouts, signals)
    assert torch.equal(found, coefficients_of(make("dapo"), rollouts, signals))


@pytest.mark.parametrize("metric", ["probability", "entropy"])
def test_signs_never_change_and_the_right_number_of_tokens_does(metric: str) -> None:
    rollouts, signals = synthetic_batch()
    base = advantages_of(make("grpo", kl_coef=0.0), rollouts, signals)
    found = advantages_of(make("a3po", scale=3.0, metric=metric), rollouts, signals)
    assert torch.equal(found.sign(), base.sign())
    moved = (base != 0).any(-1)
    expected = (rollouts.mask.sum(-1) * 0.2).floor().clamp(min=1).long() * moved
    assert torch.equal((found != base).sum(-1), expected)
    assert bool(moved.any())


def test_scale_falls_to_one_and_stays() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("a3po")
    for step, scale in ((0, 2.0), (25, 1.75), (99, 1.01), (100, 1.0), (5000, 1.0)):
        fixed = advantages_of(make("a3po", scale=scale), rollouts, signals)
        close(advantages_of(algorithm, rollouts, signals, step=step), fixed)


def test_a_side_is_told_by_the_verifier_not_by_shaped_rewards() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 1]])
    signals = signals_of(rollouts, old_logprobs=torch.cat([row(-2, -1), row(-2, -1)]))
    harsh = {"part": "dapo/overlong-penalty", "length": 2, "cache": 1.0, "factor": 2.0}
    algorithm = make("a3po", scale=3.0).override(reward=[harsh])
    plain = advantages_of(algorithm.override(credit=None), rollouts, signals)
    found = advantages_of(algorithm, rollouts, signals)
    close(found, plain * torch.cat([row(3, 1), row(1, 3)]))


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.5}, {"positive_low": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a3po needs"):
        a3po(row(1.0), vector(1.0), row(-1.0), ones(1), **wrong)


# -- polarity of whole samples


def polar(positive: float, negative: float) -> Tensor:
    rewards = vector(1.0, 0.0, 1.0, 0.0, NAN)
    return polarity(rewards, rewards, ones(5), positive=positive, negative=negative).squeeze(-1)


def test_single_polarities_and_weights() -> None:
    close(polar(1.0, 0.0), [1.0, 0.0, 1.0, 0.0, 0.0])
    close(polar(0.0, 1.0), [0.0, -1.0, 0.0, -1.0, 0.0])
    close(polar(2.0, 0.5), [2.0, -0.5, 2.0, -0.5, 0.0])


def test_psr_and_nsr_add_up_to_p1n1() -> None:
    rollouts, signals = synthetic_batch()
    base = make("grpo", kl_coef=0.0)
    for stage in ("advantage", "credit"):
        name = {"advantage": "a3po/polarity", "credit": "a3po/weighted"}[stage]
        psr, nsr, both = (
            coefficients_of(base.override(**{stage: {"part": name, "positive": x, "negative": y}}), rollouts, signals)
            for x, y in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
        )
        close(psr + nsr, both)
        assert bool((psr != 0).any())
        assert bool((nsr != 0).any())


def test_only_the_ratio_of_the_weights_matters_up_to_the_learning_rate() -> None:
    rollouts, signals = synthetic_batch()
    base = make("grpo", kl_coef=0.0)
    for stage, name in (("advantage", "a3po/polarity"), ("credit", "a3po/weighted")):
        one, two = (
            coefficients_of(
                base.override(**{stage: {"part": name, "positive": 2 * k, "negative": k}}), rollouts, signals
            )
            for k in (1.0, 3.0)
        )
        close(3 * one, two)


def test_weights_of_one_leave_any_advantage() -> None:
    advantages = torch.tensor([[0.5, -3.0], [1.0, NAN]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    close(weighted(advantages, vector(0.0, 1.0), mask), [[0.5, -3.0], [1.0, 0.0]])
    close(weighted(advantages, vector(0.0, 1.0), mask, positive=2.0, negative=0.0), [[0.0, 0.0], [2.0, 0.0]])


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    found = coefficients_of(make("a3po"), rollouts, signals)
    plain = coefficients_of(make("grpo", kl_coef=0.0), rollouts, signals)
    assert not torch.allclose(found, plain)
    other = coefficients_of(make("a3po", metric="entropy"), rollouts, signals)
    assert not torch.allclose(found, other)
    # Tokens are doubled, nothing else moves.
    share = (found / plain)[plain != 0]
    assert set(share.tolist()) == {1.0, 2.0}
