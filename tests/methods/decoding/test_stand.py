"""STAND: n-grams that keep laws, their mean, the longest known suffix."""

from __future__ import annotations

import pytest

from tokenloom.methods.decoding.stand import NGramTable, averaged, normalized, stand


def test_two_observations_are_held_as_their_mean() -> None:
    table = NGramTable()
    table.add([4, 7], ((1, 2), (0.75, 0.25)))
    table.add([9, 7], ((3, 2), (0.5, 0.5)))
    n, (tokens, probs) = table.find([7])  # type: ignore[misc]
    assert n == 1
    assert dict(zip(tokens, probs, strict=True)) == pytest.approx({1: 0.375, 2: 0.375, 3: 0.25})
    assert table.find([4, 7]) == (2, ((1, 2), (0.75, 0.25)))
    table.add([5, 7], ((1,), (1.0,)))
    _, (tokens, probs) = table.find([7])  # type: ignore[misc]
    assert dict(zip(tokens, probs, strict=True)) == pytest.approx({1: 1.75 / 3, 2: 0.75 / 3, 3: 0.5 / 3})


def test_the_longest_known_suffix_speaks() -> None:
    table = NGramTable(longest=3)
    table.add([1, 2, 3, 4], ((8,), (1.0,)))
    assert len(table) == 3
    assert stand(table, [9, 2, 3, 4])[0] == 3
    assert stand(table, [9, 9, 3, 4])[0] == 2
    assert stand(table, [4])[0] == 1
    assert stand(table, [5]) == (0, None)
    assert stand(table, []) == (0, None)


def test_the_most_probable_are_kept_and_sum_to_one() -> None:
    assert normalized((5, 3, 4), (0.2, 0.2, 0.1), kept=2) == ((3, 5), (0.5, 0.5))
    assert normalized((5, 3), (0.0, 2.0), kept=2) == ((3,), (1.0,))
    tokens, probs = averaged(((1, 2), (0.6, 0.4)), ((3,), (1.0,)), 1, kept=2)
    assert tokens == (3, 1)
    assert probs == pytest.approx((0.5 / 0.8, 0.3 / 0.8))


def test_what_keeps_nothing_is_refused() -> None:
    for wrong in ({"longest": 0}, {"kept": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            NGramTable(**wrong)
