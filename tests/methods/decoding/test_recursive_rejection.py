"""Recursive rejection: worked acceptances, the target's law on trees, with and without replacement."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from tests.methods.decoding.drafting import CHAIN, TWO, TWO_BY_TWO, P, Q, assert_lossless, outcome_at_a_node
from tokenloom.draw import law_of
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.recursive_rejection import distinct, recursive_rejection, without
from tokenloom.methods.decoding.speculative_sampling import speculative_sampling

WITH = functools.partial(recursive_rejection, replacement=True)


def test_worked_numbers() -> None:
    token, accepted = outcome_at_a_node(WITH, 2, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.76, abs=1e-12)
    token, accepted = outcome_at_a_node(recursive_rejection, 2, "distinct")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.8085714285714286, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_trees_of_two_by_two_have_the_targets_law(seed: int) -> None:
    apart = assert_lossless(recursive_rejection, TWO_BY_TWO, "distinct", seed=seed)
    assert apart > assert_lossless(recursive_rejection, TWO, "distinct", seed=seed)
    assert_lossless(WITH, TWO_BY_TWO, "independent", seed=seed, vocab=2)


def test_one_draft_is_speculative_sampling() -> None:
    for rule, drawing in ((WITH, "independent"), (recursive_rejection, "distinct")):
        assert outcome_at_a_node(rule, 1, drawing)[1] == outcome_at_a_node(speculative_sampling, 1, "independent")[1]
    assert assert_lossless(WITH, CHAIN, "independent") == pytest.approx(
        assert_lossless(speculative_sampling, CHAIN, "independent"), abs=1e-12
    )


def test_more_drafts_than_tokens() -> None:
    token, accepted = outcome_at_a_node(recursive_rejection, 7, "distinct")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(1.0, abs=1e-12)


def test_sparse_laws_are_laws() -> None:
    q = (torch.tensor([1, 2]), torch.tensor([0.5, 0.5]))
    tree = DraftTree([2, 1], [ROOT, ROOT], {ROOT: q})
    law: dict[int, float] = {}
    # Both orders of the two tokens are as probable; together the target's law comes out.
    for tokens in ([2, 1], [1, 2]):
        tree = DraftTree(tokens, [ROOT, ROOT], {ROOT: q})

        def program(draw: object, tree: DraftTree = tree) -> int:
            path, bonus = recursive_rejection(tree, torch.stack([P] * 3), draw)  # type: ignore[arg-type]
            return tree.tokens[path[0]] if path else bonus

        for token, mass in law_of(program).items():
            law[token] = law.get(token, 0.0) + mass / 2
    assert [law[i] for i in range(3)] == pytest.approx(P.tolist(), abs=1e-12)


def test_draws_without_replacement_are_in_gumbel_order() -> None:
    law = law_of(lambda draw: tuple(distinct(Q, draw, count=2)))
    for (first, second), mass in law.items():
        assert mass == pytest.approx(float(Q[first] * Q[second] / (1 - Q[first])), abs=1e-12)
    noise = -torch.empty(20_000, 3, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0)).log()
    order = (Q.log() + noise).argsort(-1, descending=True)[:, :2]
    # Five standard errors of 20,000 draws.
    for pair, mass in law.items():
        share = float((order == torch.tensor(pair)).all(-1).double().mean())
        assert abs(share - mass) < 5 * math.sqrt(mass * (1 - mass) / 20_000)


def test_edges() -> None:
    assert law_of(lambda draw: tuple(distinct(torch.tensor([0.0, 1.0]), draw, count=3))) == {(1,): 1.0}
    assert float(without(torch.tensor([0.0, 1.0]), 1).sum()) == 0
    with pytest.raises(ValueError, match="came without"):
        recursive_rejection(DraftTree([0], [ROOT]), torch.stack([P, P]), None)  # type: ignore[arg-type]
