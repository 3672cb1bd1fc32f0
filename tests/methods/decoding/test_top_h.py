"""Top-H."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
from transformers import TopHLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept, random_scores
from tokenloom.decode import shaper
from tokenloom.methods.decoding.top_h import top_h

Variant = Literal["paper", "released"]


@pytest.mark.parametrize(
    ("alpha", "paper", "released"), [(0.5, 2, 1), (0.6, 2, 2), (0.4, 1, 1), (1.0, 5, 5), (0.01, 1, 1)]
)
def test_worked_numbers(alpha: float, paper: int, released: int) -> None:
    # Entropies of the laws cut off: 0, .5983, .9587, ...; partial sums: .3466, .6685, ...; H = 1.333074.
    assert kept(top_h(P, alpha=alpha, variant="paper")) == list(range(paper))
    assert kept(top_h(P, alpha=alpha, variant="released")) == list(range(released))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_sets_grow_with_alpha(variant: Variant) -> None:
    probs = random_scores().softmax(-1)
    alphas = [0.1, 0.3, 0.4, 0.6, 0.8, 0.95, 1.0]
    sets = [top_h(probs, alpha=alpha, variant=variant, top_n=200) for alpha in alphas]
    assert all(bool((small <= large).all()) for small, large in pairwise(sets))
    assert torch.equal(sets[-1], probs > 0)


def test_the_papers_bound_holds_and_the_next_token_breaks_it() -> None:
    for probs in random_scores().softmax(-1):
        keep = top_h(probs[None], alpha=0.5, variant="paper")[0]
        order = probs.argsort(descending=True)
        size = int(keep.sum())
        assert bool(keep[order[:size]].all())
        entropies = [
            float(torch.special.entr(c / c.sum()).sum()) for c in (probs[order[:size]], probs[order[: size + 1]])
        ]
        bound = 0.5 * float(torch.special.entr(probs).sum())
        assert entropies[0] <= bound < entropies[1] or size == 1


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("vocab", [60, 200])
def test_transformers_keeps_the_same(alpha: float, vocab: int) -> None:
    # Possible tokens only: theirs gives 0 log 0 = nan and stops there.
    scores = random_scores(vocab=vocab)
    agree(lambda p: top_h(p, alpha=alpha), TopHLogitsWarper(alpha), torch.where(scores.isinf(), -30.0, scores))


def test_top_n_renormalizes_to_the_most_probable() -> None:
    # Of .5, .3 renormalized, entropies add up to .293752 + .367819 = .661563; alone, .293752 is 44.4 % of it.
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert kept(top_h(probs, alpha=0.9, top_n=2)) == [0]
    assert kept(top_h(probs, alpha=1.0, top_n=2)) == [0, 1]
    assert kept(top_h(probs, alpha=0.9, top_n=3)) == [0, 1]


def test_scores_may_be_shifted_and_certainty_is_kept() -> None:
    scores = random_scores()
    cut = shaper("top-h")
    found = [cut(torch.zeros(64, 1), s) > -torch.inf for s in (scores, scores + 7.5)]
    assert torch.equal(*found)
    assert kept(top_h(torch.tensor([[0.0, 1.0, 0.0]]))) == [1]
    assert kept(top_h(torch.full((1, 4), 0.25), alpha=0.6)) == [0, 1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="share of the entropy"):
        top_h(P, alpha=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        top_h(P, top_n=0)
