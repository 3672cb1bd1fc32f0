"""D3S: the widest subset against brute force, the highest-scoring tokens, the schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
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
    vector,
)
from tokenloom.methods.policy_optimization.d3s import d3s, d3s_tokens, share_of, widest_subset


def variance(values: torch.Tensor) -> float:
    return float(values.double().var(correction=0))


def test_defaults() -> None:
    assert defaults("d3s") == {"fraction": 0.5, "within": "batch"}
    assert defaults("d3s/tokens") == {"fraction": 0.5}
    assert preset_defaults("d3s") == {
        "base": "grpo", "within": "batch", "rows": 0.25, "rows_end": 0.5, "tokens": 0.2, "tokens_end": 0.6,
        "steps": 100,
    }  # fmt: skip
    algorithm = make("d3s")
    assert algorithm.aggregate.params == {"count": "weights"}
    assert make("d3s", base="gspo").log_ratio.part.name == "gspo"


def test_the_schedule_uses_less_than_a_fifth_of_the_tokens() -> None:
    # The average of rows * tokens over the default schedule, by Simpson's rule (exact for a quadratic).
    shares = [(0.25 + 0.25 * s) * (0.2 + 0.4 * s) for s in (0.0, 0.5, 1.0)]
    assert (shares[0] + 4 * shares[1] + shares[2]) / 6 == pytest.approx(0.1583333)


# -- rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_subset_has_the_variance_of_brute_force(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(8, generator=g).double()
    if seed % 2:
        values = values.round()  # ties
    keep = widest_subset(values, size)
    assert int(keep.sum()) == size
    best = max(variance(values[list(chosen)]) for chosen in itertools.combinations(range(8), size))
    assert variance(values[keep]) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_pair_is_the_extremes_and_spreads_more_than_the_whole(seed: int) -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(seed)).double()
    keep = widest_subset(values, 2)
    assert {float(v) for v in values[keep]} == {float(values.min()), float(values.max())}
    assert variance(values[keep]) >= variance(values)


def test_equal_advantages_keep_the_first_rows() -> None:
    assert widest_subset(torch.full((5,), 0.1), 3).tolist() == [True] * 3 + [False] * 2
    assert widest_subset(torch.full((2,), 0.1), 3).tolist() == [True] * 2
    assert widest_subset(torch.zeros(0), 3).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_centered_advantages_drop_their_zeros_first(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    signed = torch.randn(6, generator=g).double()
    values = torch.cat([signed - signed.mean(), torch.zeros(4).double()])[torch.randperm(10, generator=g)]
    for size in range(2, 11):
        keep = widest_subset(values, size)
        assert int((values[keep] == 0).sum()) == max(size - 6, 0)


def test_zeros_are_not_dropped_first_when_advantages_are_not_centered() -> None:
    # The sheet's rule needs a zero sum: here dropping a 10 widens the spread more than dropping the 0.
    assert widest_subset(vector(-1, 0, 10, 10, 10), 4).tolist() == [True, True, False, True, True]


def test_rows_are_chosen_across_groups_or_inside_each() -> None:
    advantages, group = vector(-3, 0, 3, -1, 0, 1)[:, None], torch.tensor([4, 4, 4, 9, 9, 9])
    assert d3s(advantages, group, ones(6), fraction=1 / 3).tolist() == [True, False, True, False, False, False]
    inside = d3s(advantages, group, ones(6), fraction=2 / 3, within="group")
    assert inside.tolist() == [True, False, True, True, False, True]


def test_a_row_without_tokens_is_no_candidate_unless_all_stay() -> None:
    mask = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    advantages = torch.tensor([[1.0, 1.0], [NAN, NAN], [-1.0, NAN], [0.0, 0.0]], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.int64)
    assert d3s(advantages, group, mask, fraction=0.5).tolist() == [True, False, True, False]
    assert d3s(advantages, group, mask, fraction=1.0).tolist() == [True] * 4
    assert not bool(d3s(advantages, group, torch.zeros_like(mask)).any())


@pytest.mark.parametrize(("fraction", "number", "kept"), [(0.07, 100, 7), (0.2, 16, 4), (1.0, 7, 7), (0.01, 7, 1)])
def test_fractions_round_up_without_noise(fraction: float, number: int, kept: int) -> None:
    assert share_of(fraction, number) == kept


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.1])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=str(fraction)):
        d3s(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), ones(1), fraction=fraction)
    with pytest.raises(ValueError, match=str(fraction)):
        d3s_tokens(torch.zeros(1, 1), torch.zeros(1, 1), ones(1), fraction=fraction)


# -- tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5, 0.9])
def test_selected_scores_are_the_largest(seed: int, fraction: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 6, generator=g) > 0.3
    advantages, entropies = torch.randn(5, 6, generator=g), torch.rand(5, 6, generator=g)
    chosen = d3s_tokens(advantages, entropies, mask, fraction=fraction).bool()
    score = advantages.abs() * entropies
    assert int(chosen.sum()) == math.ceil(fraction * int(mask.sum()) - 1e-6)
    assert not bool((chosen & ~mask).any())
    assert float(score[chosen].min()) >= float(score[mask & ~chosen].max())


def test_a_certain_or_neutral_token_goes_first() -> None:
    # Scores 0.9, 0, 0, 0.4: an entropy of 0 and an advantage of 0 weigh nothing.
    found = d3s_tokens(row(-0.9, 3.0, 0.0, 0.4), row(1.0, 0.0, 9.0, 1.0), ones(1, 4))
    close(found, [[1, 0, 0, 1]])


# -- the whole


@pytest.mark.parametrize("base", ["grpo", "gspo"])
def test_everything_kept_is_the_base(base: str) -> None:
    rollouts, signals = synthetic_batch()
    everything = make("d3s", base=base, rows=1.0, rows_end=1.0, tokens=1.0, tokens_end=1.0)
    plain = make(base, **({"kl_coef": 0.0} if base == "grpo" else {})).override(aggregate="token-mean")
    close(coefficients_of(everything, rollouts, signals), coefficients_of(plain, rollouts, signals))


def test_selection_relaxes_over_the_run() -> None:
    rollouts, signals = synthetic_batch()
    counts = []
    for step in range(0, 101, 10):
        plan = make("d3s", rows_end=1.0, tokens_end=1.0).plan(rollouts, signals, step=step)
        counts.append((int(plan.values["keep"].sum()), int(plan.values["weights"].sum())))
    assert counts == sorted(counts)
    assert counts[0][0] < counts[-1][0] == 12
    assert counts[0][1] < counts[-1][1] == int(rollouts.mask.sum())


def test_steps_none_spans_the_run() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("d3s", steps=None)
    one, two = (algorithm.plan(rollouts, signals, step=s, total_steps=t) for s, t in ((5, 10), (50, 100)))
    assert torch.equal(one.values["weights"], two.values["weights"])
    with pytest.raises(ValueError, match="give it steps"):
        algorithm.plan(rollouts, signals)


def test_advantages_stay_and_the_normalizer_counts_selected_tokens() -> None:
    # Rewards 1, 0, 0, 0: A = 1.5, -.5, -.5, -.5. Half of the rows: 0 and 1. Half of their four tokens: H of 2 and .9.
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0], mask=[[1, 1]] * 4)
    entropies = torch.tensor([[0.9, 0.1], [2.0, 0.2], [9.0, 9.0], [9.0, 9.0]], dtype=torch.float64)
    same: dict[str, Any] = {"rows": 0.5, "rows_end": 0.5, "tokens": 0.5, "tokens_end": 0.5}
    found = coefficients_of(make("d3s", **same), rollouts, signals_of(rollouts, entropies=entropies))
    close(found, [[0.75, 0], [-0.25, 0], [0, 0], [0, 0]], 1e-5)


def test_entropy_carries_no_gradient() -> None:
    entropies = torch.rand(2, 3, requires_grad=True)
    assert not d3s_tokens(torch.ones(2, 3), entropies, ones(2, 3)).requires_grad
