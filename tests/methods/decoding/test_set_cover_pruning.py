"""Set cover: who stays, and the greedy guarantee."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.set_cover_pruning import set_cover


def types(*sets: str) -> Tensor:
    union = sorted(set("".join(sets)))
    return torch.tensor([[u in s for u in union] for s in sets])


def test_worked_picks() -> None:
    # Gains .5 * 3, .9 * 2, .4 * 4: the second first; then .5 * 2, -, .4 * 3: the third; all is covered.
    keep = set_cover(types("abc", "ax", "bcdx"), torch.tensor([0.5, 0.9, 0.4]), coverage=1.0)
    assert keep.tolist() == [False, True, True]


def test_full_coverage_keeps_every_type() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        given = torch.rand(7, 12, generator=g) < 0.3
        keep = set_cover(given, torch.rand(7, generator=g) + 0.1, coverage=1.0)
        assert torch.equal(given[keep].any(0), given.any(0))


def test_a_subset_of_one_equally_confident_is_dropped() -> None:
    assert set_cover(types("ab", "abc", "cd"), torch.ones(3), coverage=1.0).tolist() == [False, True, True]
    # Equal sets: the first stays.
    assert set_cover(types("ab", "ab"), torch.ones(2), coverage=1.0).tolist() == [True, False]


def test_no_coverage_keeps_one() -> None:
    # Of sets of one size the most confident; in general the first pick.
    assert set_cover(types("ab", "cd", "ef"), torch.tensor([0.2, 0.9, 0.5]), coverage=0.0).tolist() == [0, 1, 0]
    assert set_cover(types("abcdefgh", "i"), torch.tensor([0.2, 0.9]), coverage=0.0).tolist() == [True, False]


def test_the_least_number_of_survivors() -> None:
    given, confidence = types("ab", "ab", "ab", "a"), torch.tensor([0.5, 0.4, 0.9, 0.8])
    assert set_cover(given, confidence, coverage=1.0, survivors=2).tolist() == [False, False, True, True]
    assert set_cover(given, confidence, survivors=9).all()


def test_a_share_of_the_types_is_not_one_too_many() -> None:
    # .7 * 10 is 7.000000000000001 - or just below it - in floating point.
    given = types("abcdefg", "hij")
    for coverage in (0.7, 0.1 * 7):
        assert set_cover(given, torch.ones(2), coverage=coverage).tolist() == [True, False]


def test_the_weight_is_within_the_greedy_bound_of_the_least() -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(40):
        given, confidence = torch.rand(6, 8, generator=g) < 0.35, torch.rand(6, generator=g) + 0.05
        weights = 1 / confidence.double()
        keep = set_cover(given, confidence, coverage=1.0)
        union = given.any(0)
        if not bool(union.any()):
            continue
        least = min(
            float(weights[list(some)].sum())
            for size in range(1, 7)
            for some in itertools.combinations(range(6), size)
            if torch.equal(given[list(some)].any(0), union)
        )
        assert float(weights[keep].sum()) <= (1 + math.log(int(union.sum()))) * least + 1e-9


def test_mistakes_are_named() -> None:
    for settings in ({"coverage": 1.2}, {"coverage": -0.1}, {"survivors": 0}):
        with pytest.raises(ValueError, match="share in"):
            set_cover(types("a"), torch.ones(1), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0"):
        set_cover(types("a"), torch.zeros(1))
