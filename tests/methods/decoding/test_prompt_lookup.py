"""Prompt look-up: where it looks, and that any drafted token leaves the target's law alone."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoding.drafting import TWO_BY_TWO, P, assert_lossless, outcome_at_a_node
from tokenloom.draw import Draw, RandomDraw, law_of
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.prompt_lookup import prompt_lookup, verify


def test_the_latest_of_the_longest_matches() -> None:
    text = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 7, 5, 2, 3]
    assert prompt_lookup(text, drafts=2) == [7, 5]
    assert prompt_lookup([*text, 8, 1, 2, 3], drafts=3) == [7, 5, 2]
    assert prompt_lookup([4, 6, 4], drafts=1) == [6]
    assert prompt_lookup([4, 6, 4], shortest=2) == []
    assert prompt_lookup([4, 6, 5]) == []
    assert prompt_lookup([4]) == []
    assert prompt_lookup([]) == []


def test_loops_are_followed_at_full_length() -> None:
    assert prompt_lookup([3, 7, 7, 7], drafts=4) == [7, 7, 7, 7]
    assert prompt_lookup([1, 2, 1, 2, 1], drafts=5) == [2, 1, 2, 1, 2]


@pytest.mark.parametrize("token", range(3))
def test_any_proposed_token_gives_the_targets_law(token: int) -> None:
    tree = DraftTree([token], [ROOT])
    law = law_of(lambda draw: (tree.tokens[path[0]] if (path := (v := verify(tree, torch.stack([P, P]), draw)).path)
                               else v.bonus, bool(path)))  # fmt: skip
    for value in range(3):
        assert law.get((value, value == token), 0.0) == pytest.approx(float(P[value]), abs=1e-12)
        assert (value, value != token) not in law


def test_it_is_the_rule_that_accepts_one_draft_after_the_other() -> None:
    def sequential(tree: DraftTree, laws: torch.Tensor, draw: Draw) -> tuple[int | None, int]:
        p = laws[0].clone()
        for place, token in enumerate(tree.tokens):
            if draw.bernoulli(float(p[token] / p.sum())):
                return place, token
            p[token] = 0
        return None, draw.categorical(p)

    tree, laws = DraftTree([2, 0], [ROOT, ROOT]), torch.stack([P, P, P])
    theirs = law_of(lambda draw: sequential(tree, laws, draw))

    def ours(draw: Draw) -> tuple[int | None, int]:
        path, bonus = verify(tree, laws, draw)
        return (path[0], tree.tokens[path[0]]) if path else (None, bonus)

    found = law_of(lambda draw: ours(draw))
    # Below an accepted node another token is drawn, which is summed out.
    assert found.keys() == theirs.keys()
    for outcome, mass in theirs.items():
        assert found[outcome] == pytest.approx(mass, abs=1e-12)


def test_trees_drawn_in_any_way() -> None:
    assert_lossless(verify, TWO_BY_TWO, "distinct")
    assert_lossless(verify, TWO_BY_TWO, "given")
    token, accepted = outcome_at_a_node(verify, 1, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.31, abs=1e-12)


def test_the_tokens_are_those_of_plain_sampling() -> None:
    laws = torch.stack([P, P.flip(0), P.roll(1)])
    tree = DraftTree([0, 1], [ROOT, 0])
    for seed in range(20):
        plain, ours = (RandomDraw(torch.Generator().manual_seed(seed)) for _ in range(2))
        path, bonus = verify(tree, laws, ours)
        got = [*(tree.tokens[node] for node in path), bonus]
        assert got == [plain.categorical(law) for law in laws[: len(got)]]


def test_lengths_out_of_order_are_refused() -> None:
    for wrong in ({"longest": 1, "shortest": 2}, {"shortest": 0}, {"drafts": 0}):
        with pytest.raises(ValueError, match="shortest <= longest"):
            prompt_lookup([1, 2], **wrong)
