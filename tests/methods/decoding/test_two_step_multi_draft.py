"""Two-step selection: the best acceptance by cut, by sorting and by flow; rules that lose nothing."""

from __future__ import annotations

import functools
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from tests.methods.decoding.drafting import CHAIN, TWO, TWO_BY_TWO, P, Q, assert_lossless, outcome_at_a_node
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.speculative_sampling import acceptance, speculative_sampling
from tokenloom.methods.decoding.two_step_flow import best_picks, draft_sets
from tokenloom.methods.decoding.two_step_multi_draft import (
    optimal_acceptance,
    picked_by_rank,
    picking,
    ranks,
    two_step_multi_draft,
)

BEST = functools.partial(two_step_multi_draft, support=3)


def pairs(count: int, vocab: int = 5) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(count)
    laws = torch.rand(12, 2, vocab, generator=g, dtype=torch.float64).pow(3).add(1e-3)
    return [(p / p.sum(), q / q.sum()) for p, q in laws]


def by_cut(p: Tensor, q: Tensor, count: int) -> float:
    """1 + min over all sets S of P(S) - Q(S)^K, one by one."""
    v = range(len(p))
    sets = [list(S) for n in range(len(p) + 1) for S in combinations(v, n)]
    return 1 + min(float(p[S].sum() - q[S].sum() ** count) for S in sets)


def test_worked_numbers() -> None:
    for count, best in ((1, 0.7), (2, 0.86), (3, 0.988)):
        assert float(optimal_acceptance(P, Q, count=count)) == pytest.approx(best, abs=1e-12)
    ranked = picked_by_rank(Q, ranks(P, Q), 2)
    torch.testing.assert_close(ranked, torch.tensor([0.36, 0.25, 0.39], dtype=torch.float64))
    token, accepted = outcome_at_a_node(two_step_multi_draft, 2, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.81, abs=1e-12)


def test_the_best_acceptance_is_reached() -> None:
    token, accepted = outcome_at_a_node(BEST, 2, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.86, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_sorting_cut_and_flow_agree(count: int) -> None:
    for p, q in pairs(count):
        best = float(optimal_acceptance(p, q, count=count))
        assert best == pytest.approx(by_cut(p, q, count), abs=1e-12)
        law, _ = picking(p, q, count=count, support=len(p))
        # A flow that reaches the cut is the optimum of the linear program.
        assert float(acceptance(p, law)) == pytest.approx(best, abs=1e-9)
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("support", [0, 2, 3, 4])
def test_the_law_of_the_pick_is_exact(support: int) -> None:
    for p, q in pairs(7, vocab=4)[:6]:
        law, choose = picking(p, q, count=2, support=support)
        found = torch.zeros_like(q)

        class Spread:
            """Adds all choices at once, each with its share."""

            def __init__(self, mass: float) -> None:
                self.mass = mass

            def categorical(self, weights: Tensor) -> int:
                self.shares = weights / weights.sum()
                return 0

        for tokens in product(range(4), repeat=2):
            mass = float(q[list(tokens)].prod())
            spread = Spread(mass)
            first = choose(list(tokens), spread)  # type: ignore[arg-type]
            shares = getattr(spread, "shares", None)
            if shares is None:
                found[first] += mass
                continue
            for i in range(len(shares)):
                spread.categorical = lambda weights, i=i: i  # type: ignore[method-assign]
                found[choose(list(tokens), spread)] += mass * float(shares[i])  # type: ignore[arg-type]
        torch.testing.assert_close(found, law, rtol=0, atol=1e-12)
        assert float(acceptance(p, law)) <= float(optimal_acceptance(p, q, count=2)) + 1e-12


def test_ranks_that_would_be_worse_than_one_draft_are_not_used() -> None:
    p = torch.tensor([0.6, 0.4], dtype=torch.float64)
    assert float(acceptance(p, picked_by_rank(p, ranks(p, p), 2))) == pytest.approx(0.76, abs=1e-12)
    assert outcome_at_a_node(two_step_multi_draft, 2, "independent", p=p, q=p)[1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_trees_have_the_targets_law(seed: int) -> None:
    assert_lossless(two_step_multi_draft, TWO_BY_TWO, "independent", seed=seed, vocab=2)
    assert_lossless(two_step_multi_draft, TWO, "independent", seed=seed)
    assert_lossless(BEST, TWO, "independent", seed=seed)
    assert_lossless(functools.partial(two_step_multi_draft, support=2), Shape([ROOT] * 3, [0, 1, 2]), "independent")


def test_one_draft_is_speculative_sampling() -> None:
    assert assert_lossless(two_step_multi_draft, CHAIN, "independent") == pytest.approx(
        assert_lossless(speculative_sampling, CHAIN, "independent"), abs=1e-12
    )


def test_sets_of_drafts() -> None:
    sets = draft_sets([0.2, 0.5, 0.3], 2)
    assert sum(sets.values()) == pytest.approx(1, abs=1e-12)
    assert sets[frozenset({0, 1})] == pytest.approx(0.2, abs=1e-12)
    assert sets[frozenset({2})] == pytest.approx(0.09, abs=1e-12)
    # What nobody has room for goes to the token of lowest rank.
    assert best_picks([0.5, 0.5], [0.0, 0.0], [1, 0], 2)[frozenset({0, 1})] == {1: pytest.approx(0.5), 0: 0.0}


def test_edges() -> None:
    p, q = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    for rule in (two_step_multi_draft, BEST):
        token, accepted = outcome_at_a_node(rule, 2, "independent", p=p, q=q)
        assert torch.equal(token, p)
        assert accepted == 0
    with pytest.raises(ValueError, match="support"):
        two_step_multi_draft(DraftTree([], []), torch.stack([P]), None, support=-1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        optimal_acceptance(P, Q, count=0)
