"""SPINE: votes, forking tokens, the entropy band."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
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
    synthetic_batch,
    vector,
)
from tokenloom.batch import Rollouts
from tokenloom.masked import masked_quantile
from tokenloom.methods.policy_optimization.spine import band, forking, outside_band, row_quantile, vote
from tokenloom.signals import Signals

GROUP = torch.zeros(3, dtype=torch.int64)
ZEROS = vector(0, 0, 0)


def voting_batch() -> tuple[Rollouts, Signals]:
    """The shared batch with answers: group 4 votes for "b", group 9 for "a", group 2 all for "c"."""
    rollouts, signals = synthetic_batch()
    return rollouts.replace(answers=("a", "a", "b", "a", "c", "b", "a", "b", "b", "c", "b", "c")), signals


def test_defaults() -> None:
    assert defaults("spine/vote") == {"skip_single": False}
    assert defaults("spine/forking") == {"rho": 0.2}
    assert defaults("spine/band") == {"q_lo": 0.1, "q_hi": 0.9}
    assert preset_defaults("spine") == {
        "rho": 0.2, "band_coef": 0.01, "q_lo": 0.1, "q_hi": 0.9, "skip_single": False, "kl_coef": 0.0,
    }  # fmt: skip
    assert [t.part.part.name for t in make("spine").terms] == ["spine/band"]
    assert [t.part.part.name for t in make("spine", band_coef=0.0, kl_coef=0.1).terms] == ["kl"]


# -- the vote


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("a", "a", "b"), [1, 1, 0]),
        (("b", "a", "a"), [0, 1, 1]),
        (("a", "b", "c"), [1, 0, 0]),  # all differ: the first seen
        ((None, "b", None), [0, 1, 0]),  # no answer is no vote, however often
        ((None, None, None), [0, 0, 0]),
        ((["1", 2], ["1", 2], 3), [1, 1, 0]),  # answers may be any JSON value
    ],
)
def test_vote(answers: tuple[Any, ...], expected: list[float]) -> None:
    close(vote(ZEROS, answers, GROUP), expected)


def test_ties_go_to_the_first_seen() -> None:
    close(vote(vector(0, 0, 0, 0), ("b", "a", "a", "b"), torch.zeros(4, dtype=torch.int64)), [1, 0, 0, 1])


def test_groups_vote_apart_and_what_the_verifier_said_is_not_read() -> None:
    answers, group = ("a", "b", "a", "b", "b"), torch.tensor([7, 3, 7, 7, 3])
    close(vote(vector(0, 0, 0, 1, 1), answers, group), [1, 1, 1, 0, 1])


def test_unscorable_rows_neither_vote_nor_count() -> None:
    found = vote(vector(0, NAN, NAN, 0, 0), ("b", "a", "a", "a", "b"), torch.zeros(5, dtype=torch.int64))
    close(found[[0, 3, 4]], [1, 0, 1])
    assert bool(found[[1, 2]].isnan().all())


def test_an_arbitrary_vote_can_be_skipped() -> None:
    answers, group = ("a", "b", None, "c", "c"), torch.tensor([0, 0, 0, 1, 1])
    found = vote(torch.zeros(5), answers, group, skip_single=True)
    assert found.isnan().tolist() == [True, True, True, False, False]
    rollouts = rollouts_of([0.0] * 5, group.tolist()).replace(answers=answers)
    signals = signals_of(rollouts, entropies=torch.ones(5, 1).double())
    close(advantages_of(make("spine", skip_single=True), rollouts, signals), 0.0)
    assert float(advantages_of(make("spine"), rollouts, signals).abs().sum()) > 0


def test_a_unanimous_vote_moves_nothing() -> None:
    rollouts = rollouts_of([0.0, 1.0, 0.0]).replace(answers=("x", "x", "x"))
    signals = signals_of(rollouts, entropies=torch.ones(3, 1).double())
    close(advantages_of(make("spine"), rollouts, signals), 0.0)


# -- forking tokens


def test_forking_tokens_of_each_response() -> None:
    entropies = torch.tensor([[0.1, 3, 0.2, 2, 0.3, 1], [9, 8, 7, 6, 5, 4.0], [1, NAN, NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[True] * 6, [True] * 5 + [False], [True] + [False] * 5])
    close(forking(entropies, mask), [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])  # ceil of 1.2, 1, .2
    close(forking(entropies, mask, rho=1.0), mask.float())


@pytest.mark.parametrize("rho", [0.0, 1.2])
def test_impossible_fractions_are_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=str(rho)):
        forking(torch.zeros(1, 1), ones(1), rho=rho)


# -- the band


def test_outside_the_band_worked_numbers_and_directions() -> None:
    low, high = torch.tensor([[1.0]]).double(), torch.tensor([[2.0]]).double()
    h = row(0.5, 1.0, 1.5, 2.0, 2.3)
    close(outside_band(h, low, high), [[0.25, 0, 0, 0, 0.09]])
    (slope,) = gradient(lambda x: outside_band(x, low, high), h)
    close(slope, [[-1.0, 0, 0, 0, 0.6]])  # descending raises H below the band and lowers it above


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_row_quantiles(seed: int, q: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.rand(6, 7, generator=g).double(), torch.rand(6, 7, generator=g) > 0.4
    mask[3] = False
    found = row_quantile(x, mask, q)
    for i in range(6):
        expected = masked_quantile(x[i], mask[i], q) if bool(mask[i].any()) else torch.zeros(()).double()
        close(found[i], expected)


def test_band_of_a_row() -> None:
    # Forking tokens 1, 2, 3, 4, 5 (and 9, which is none): quantiles .25 and .75 are 2 and 4.
    h, weights = row(1, 2, 3, 9, 4, 5), row(1, 1, 1, 0, 2, 1)
    found = band(h, weights, ones(1, 6), q_lo=0.25, q_hi=0.75)
    close(found, [[1, 0, 0, 0, 0, 1]])
    (slope,) = gradient(lambda x: band(x, weights, ones(1, 6), q_lo=0.25, q_hi=0.75), h)
    close(slope, [[-2, 0, 0, 0, 0, 2]])  # the limits are detached
    close(band(h, weights * 0, ones(1, 6)), 0.0)
    close(band(torch.full((1, 4), 0.7), torch.ones(1, 4), ones(1, 4)), 0.0)  # one value is its own band


def test_rows_have_their_own_bands_and_no_hole_leaks() -> None:
    h = torch.tensor([[1, 2, 3, NAN], [10, 20, 30, math.inf], [NAN] * 4]).double()
    mask = torch.tensor([[True] * 3 + [False]] * 2 + [[False] * 4])
    found = band(h, torch.ones(3, 4), mask, q_lo=0.25, q_hi=0.75)
    close(found, [[0.25, 0, 0.25, 0], [25, 0, 25, 0], [0] * 4])
    (slope,) = gradient(lambda x: band(x, torch.ones(3, 4), mask), h)
    assert bool((slope[~mask] == 0).all())


def test_impossible_bands_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_lo=0\.9"):
        band(torch.zeros(1, 1), torch.zeros(1, 1), ones(1), q_lo=0.9, q_hi=0.1)


# -- the whole


def entropies_of(rollouts: Rollouts) -> Tensor:
    return torch.linspace(0.1, 2.0, rollouts.mask.numel()).double().reshape(rollouts.mask.shape)


def test_without_band_and_selection_it_is_majority_voting_on_grpo() -> None:
    rollouts, signals = voting_batch()
    found = coefficients_of(make("spine", rho=1.0, band_coef=0.0), rollouts, signals)
    assert rollouts.answers is not None
    assert rollouts.rewards is not None
    voted = rollouts.replace(rewards=vote(rollouts.rewards, rollouts.answers, rollouts.group_ids))
    close(found, coefficients_of(make("grpo", kl_coef=0.0).override(aggregate="token-mean"), voted, signals))


def test_loss_and_band_count_forking_tokens_only() -> None:
    rollouts = rollouts_of([0.0] * 3, mask=[[1] * 5] * 3).replace(answers=("a", "a", "b"))
    signals = signals_of(rollouts, entropies=entropies_of(rollouts))
    plan = make("spine", rho=0.4).plan(rollouts, signals)
    fork = torch.tensor([[0, 0, 0, 1, 1]] * 3).double()
    close(plan.values["weights"], fork)
    close(plan.values["scale"], 1 / 6)
    found = make("spine", rho=0.4, band_coef=0.5).coefficients(rollouts, signals)
    # Two forking tokens a row, a step d apart: L and U lie d / 10 inside of them, and each is 1 of 6.
    d = 1.9 / 14
    close(found["entropies"], 0.5 * fork * torch.tensor([0, 0, 0, 1.0, -1.0]).double() * 2 * d / 10 / 6)
    assert bool((found["logprobs"][fork == 0] == 0).all())


def test_any_split_gives_the_same_loss() -> None:
    rollouts, signals = voting_batch()
    algorithm = make("spine", band_coef=1.0)
    (update,) = algorithm.plan(rollouts, signals).updates
    whole = algorithm.loss(signals.rows(update.rows), update)[0]
    parts = [update[[i]] for i in range(len(update))]
    close(sum((algorithm.loss(signals.rows(p.rows), p)[0] for p in parts), torch.zeros(())), whole)


@pytest.mark.parametrize("without", [{"reward": None}, {"weight": None}, {"terms": None}])
def test_mechanism_shows_on_the_batch(without: dict[str, None]) -> None:
    rollouts, signals = voting_batch()
    algorithm = make("spine")
    found, plain = (a.coefficients(rollouts, signals) for a in (algorithm, algorithm.override(**without)))
    if without == {"terms": None}:
        assert float(found["entropies"].abs().sum()) > 0
        assert "entropies" not in plain
    else:
        assert not torch.allclose(found["logprobs"], plain["logprobs"], rtol=1e-6, atol=1e-9)


def test_missing_answers_are_named() -> None:
    rollouts, signals = synthetic_batch()
    with pytest.raises(ValueError, match="answers"):
        make("spine").plan(rollouts.replace(answers=None), signals)
