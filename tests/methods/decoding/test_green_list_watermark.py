"""The green-list watermark: sets, score and p-value."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import WatermarkLogitsProcessor

from tokenloom.methods.decoding.green_list_watermark import (
    detect,
    green_list_watermark,
    green_tokens,
    z_score,
)

KEY = 15485863


def test_worked_numbers() -> None:
    assert z_score(40, 100, 0.25) == pytest.approx(3.464102, abs=1e-6)


def test_green_scores_rise_and_others_stay() -> None:
    green = torch.tensor([[True, False, True], [False, False, True]])
    found = green_list_watermark(torch.zeros(2, 3), green, delta=1.5)
    assert found.tolist() == [[1.5, 0.0, 1.5], [0.0, 0.0, 1.5]]
    assert torch.equal(green_list_watermark(found, green, delta=0.0), found)


def test_an_infinite_delta_allows_green_tokens_only() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.5, 2.0], [1.0, -torch.inf, 0.5, 2.0], [-torch.inf, 3.0, 0.5, 2.0]])
    green = torch.tensor([[True, True, True, False], [False, True, False, False], [False, True, False, True]])
    found = green_list_watermark(scores, green, delta=math.inf)
    none = -math.inf
    # The green token of the second row is impossible: its law stays as it is.
    assert found.tolist() == [[1.0, none, 0.5, none], scores[1].tolist(), [none, 3.0, none, 2.0]]


def test_sets_have_their_size_and_follow_key_and_context() -> None:
    sets = {t: green_tokens([t], 100, gamma=0.25, key=KEY) for t in range(1, 40)}
    assert {len(s) for s in sets.values()} == {25}
    assert len(set(sets.values())) == 39
    assert sets[5] == green_tokens([9, 9, 5], 100, gamma=0.25, key=KEY)
    assert sets[5] != green_tokens([5], 100, gamma=0.25, key=7)
    two = [green_tokens(before, 100, gamma=0.25, key=KEY, context=2) for before in ([3, 5], [5, 3], [4, 5])]
    assert len(set(two)) == 3


def test_transformers_has_the_same_sets() -> None:
    theirs = WatermarkLogitsProcessor(50, "cpu", greenlist_ratio=0.3, bias=2.0, hashing_key=77)
    ids = torch.tensor([[4, 9], [9, 30], [1, 49]])
    shaped = theirs(ids, torch.zeros(3, 50))
    for row, before in zip(shaped, ids.tolist(), strict=True):
        assert set(row.nonzero().flatten().tolist()) == green_tokens(before, 50, gamma=0.3, key=77)


def test_the_p_value_is_the_binomial_tail() -> None:
    vocab, text = 40, [3, 8, 1, 30, 12, 5, 7, 9]
    found = detect(text, vocab)
    green = sum(b in green_tokens([a], vocab, gamma=0.25, key=KEY) for a, b in pairwise(text))
    assert (found.tokens, found.green) == (7, green)
    tail = sum(math.comb(7, k) * 0.25**k * 0.75 ** (7 - k) for k in range(green, 8))
    assert found.p_value == pytest.approx(tail, abs=1e-12)
    assert found.z == pytest.approx((green - 7 / 4) / math.sqrt(7 * 3 / 16))


def test_gamma_is_the_share_that_the_sets_really_have() -> None:
    # floor(.25 x 7) = 1 of 7 tokens.
    found = detect([1, 2, 3, 4], 7)
    assert found.z == pytest.approx((found.green - 3 / 7) / math.sqrt(3 * 6 / 49))


def test_watermarked_text_is_found_and_other_text_is_not() -> None:
    g = torch.Generator().manual_seed(0)
    text, other = [1], [1]
    for _ in range(60):
        green = sorted(green_tokens(text[-1:], 64, gamma=0.25, key=KEY))
        free = bool(torch.rand((), generator=g) < 0.5)
        text.append(int(torch.randint(64, (), generator=g)) if free else green[int(torch.randint(16, (), generator=g))])
        other.append(int(torch.randint(64, (), generator=g)))
    assert detect(text, 64).p_value < 1e-4
    assert detect(text, 64, key=4).p_value > 0.01
    assert detect(other, 64).p_value > 0.01


def test_repetition_is_no_evidence() -> None:
    token = min(green_tokens([5], 64, gamma=0.25, key=KEY) - {5})
    text = [5, token] * 50
    assert detect(text, 64).tokens == 2
    assert detect(text, 64, distinct=False).tokens == 99


def test_p_values_of_unmarked_text_are_not_too_small() -> None:
    g = torch.Generator().manual_seed(1)
    found = [detect(torch.randint(64, (30,), generator=g).tolist(), 64).p_value for _ in range(200)]
    # P(p <= .05) <= .05; 20 of 200 lie three standard deviations above it.
    assert sum(p <= 0.05 for p in found) < 20


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="none behind a context"):
        detect([5], 64)
    with pytest.raises(ValueError, match="gamma is the green share"):
        detect([5, 6], 64, gamma=0.001)
    with pytest.raises(ValueError, match="has token 64 and the vocabulary 64 tokens; give the width"):
        detect([5, 64, 6], 64)
    with pytest.raises(ValueError, match="1 at least, and 1 are there"):
        green_tokens([5], 64, gamma=0.25, key=KEY, context=2)
    with pytest.raises(ValueError, match="0 or more"):
        green_list_watermark(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), delta=-1.0)
