"""Drafters one by one: shapes that grow where drafts come true, what is looked up, quick selection of the largest."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tokenloom.decode.drafters.base import Drafter, Round, drawn, filled, largest, likeliest
from tokenloom.decode.drafters.best_first import Beliefs, Grown, Limits, best_first
from tokenloom.decode.drafters.lookup import GroupNGrams, NGramPlaces, PromptLookup
from tokenloom.decode.drafters.shapes import Chances, Shape
from tokenloom.decode.drafters.token_recycling import TokenRecycling
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.prompt_lookup import prompt_lookup


def test_a_drafter_without_drafts_cannot_be_made() -> None:
    class Idle(Drafter):
        slug = "idle"

    with pytest.raises(TypeError, match=r"abstract method '?draft"):
        Idle()  # type: ignore[abstract]  # refused when it is made, not in the middle of a run


def test_the_most_probable_nodes_are_grown() -> None:
    chances = Chances([0.5, 0.2], keys=1, branching=(2, 2), depth=3, nodes=8)
    assert chances.sums(0)[:4] == pytest.approx([0, 0.5, 0.75, 0.95])
    shape = chances.shape(0, 3, 9)
    # The child of rank 0 comes next to its parent: .5, then .25 below it, then its sibling with .2.
    assert list(shape.parents) == [ROOT, 0, ROOT]
    assert list(shape.ranks) == [0, 0, 1]
    assert max(chances.shape(0, 8, 9).depths) == 3
    assert chances.shape(0, 8, 1).depths == [1, 1]


def test_chances_follow_what_came_true() -> None:
    chances = Chances([0.5, 0.2], keys=2, branching=(2, 2), depth=4, nodes=20)
    tree = DraftTree([1, 2, 3], [ROOT, ROOT, 0])
    for _ in range(200):
        chances.note(1, tree, [1])
    assert chances.chance(1, 1, 1) > 0.9
    assert chances.chance(1, 1, 0) < 0.1
    assert chances.chance(1, 2, 0) == 0.5  # its parent was never accepted
    assert chances.chance(0, 1, 0) == 0.5
    # Siblings are drawn in order: one is never put off for the one behind it.
    sums = chances.sums(1)
    assert all(b - a <= c - b + 1 for a, b, c in zip(sums, sums[1:], sums[2:], strict=False))


def test_trees_grow_where_the_drafter_believes() -> None:
    """Against all paths of a random table: no other n nodes, each with its parent, have chances of a larger sum."""
    draw = random.Random(0)
    beliefs = Beliefs()
    for cell in range(14):
        for i in range(300):
            beliefs.note(cell, i % 300 < 20 * cell)
    table = {
        path: ([0, 1, 2], sorted((draw.randrange(14) for _ in range(3)), reverse=True))
        for depth in range(4)
        for path in itertools.product(range(3), repeat=depth)
    }
    chances = {tuple[int, ...](): 1.0}
    for path in sorted(table, key=len):
        for token, cell in zip(*table[path], strict=True):
            chances[*path, token] = chances[path] * beliefs.chance(cell)
    best = sorted((chance for path, chance in chances.items() if path), reverse=True)
    for nodes in (1, 7, 40):
        grown = best_first(lambda path: table[tuple(path)], beliefs, Limits(nodes), depth=4)
        assert len(grown.shape) == nodes
        assert grown.sums[1:] == pytest.approx(list(itertools.accumulate(best[:nodes])))
        assert max(grown.shape.depths) <= 4
    # Left open, what is hardly ever read is left out.
    grown = best_first(lambda path: table[tuple(path)], beliefs, Limits(least=0.05), depth=4)
    assert len(grown.shape) == min(sum(b >= 0.05 for b in best), 48)


def test_beliefs_become_what_was_seen() -> None:
    beliefs = Beliefs(2, trust=0.5)
    first, second = beliefs.cell(0.95, 0), beliefs.cell(0.95, 1)
    assert beliefs.chance(first) == pytest.approx(0.5 * 0.97)
    draw = random.Random(0)
    for _ in range(4000):
        beliefs.note(second, draw.random() < 0.3)
    assert beliefs.chance(second) == pytest.approx(0.3, abs=0.08)  # some 200 of the last ones count: sd 0.03
    assert beliefs.chance(first) == pytest.approx(0.5 * 0.97)


def test_token_recycling_drafts_deep_where_it_was_sure() -> None:
    drafter = TokenRecycling(branches=2)
    drafter.adjacency = torch.tensor([[1, 2], [2, 0], [0, 1], [-1, -1]], dtype=torch.int32)
    rows = torch.full((1, 2, 4), -9.0)
    rows[0, 0, 1], rows[0, 0, 2] = 4.0, 0.0
    rows[0, 1, 2], rows[0, 1, 0] = 4.0, 0.0
    # Token 0 was read before 1, 1 before 2: each time the model was sure.
    for _ in range(30):
        drafter.learn([Round(0, [0], DraftTree([1], [ROOT]), [0], 2, [0, 1], None)], rows)
    sure, unsure = drafter.grown([0], "given", Limits(2)), drafter.grown([2], "given", Limits(2))
    assert sure is not None
    assert unsure is not None
    assert list(sure.shape.parents) == [ROOT, 0]
    assert sure.sums[2] > unsure.sums[2]
    assert drafter.grown([3], "given", Limits(3)) == Grown(Shape([], []), [0.0])


def test_branching_bounds_a_shape() -> None:
    chances = Chances([0.5, 0.4, 0.3], keys=1, branching=(3, 1), depth=4, nodes=30)
    shape = chances.shape(0, 30, 9)
    assert len(shape) == 12
    assert shape.children[ROOT] == 3
    assert {count for node, count in shape.children.items() if node != ROOT} == {1}


def test_shapes_are_cut_and_begun() -> None:
    shape = Shape([ROOT, ROOT, 0, 1, 2], [0, 1, 0, 0, 0])
    assert shape.depths == [1, 1, 2, 2, 3]
    assert list(shape.cut(2).parents) == [ROOT, ROOT, 0, 1]
    assert list(shape.first(5).parents) == [ROOT, 0, 1, ROOT, 3]
    assert len(shape.first(0)) == 0
    assert shape.cut(7) is shape


def test_trees_are_filled_as_far_as_there_are_tokens() -> None:
    shape = Shape([ROOT, 0, 0, ROOT, 3], [0, 0, 1, 1, 0])
    tree = filled(shape, lambda path, count: ([7, 8][:count], None) if not path else ([9], None))
    assert list(tree.tokens) == [7, 9, 8, 9]
    assert list(tree.parents) == [ROOT, 0, ROOT, 2]
    assert len(filled(shape, lambda path, count: ([], None))) == 0


def test_children_are_drawn_as_asked() -> None:
    law, draw = torch.tensor([0.0, 0.6, 0.4]), RandomDraw(torch.Generator().manual_seed(0))
    assert drawn(law, 2, "given", draw) == [1, 2]
    assert sorted(drawn(law, 3, "distinct", draw)) == [1, 2]
    independent = drawn(law, 12, "independent", draw)
    assert set(independent) == {1, 2}
    assert len(independent) == 12


@pytest.mark.parametrize("vocab", [50, 4096, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_found(vocab: int, dtype: torch.dtype) -> None:
    scores = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    scores[1, 3:] = -torch.inf
    scores[2] = 0
    values, places = largest(scores, 8)
    torch.testing.assert_close(values, scores.topk(8).values)
    torch.testing.assert_close(scores.gather(1, places), values)
    assert all(len(set(row)) == 8 for row in places.tolist())
    assert torch.equal(likeliest(scores), scores.argmax(-1))
    assert int(likeliest(scores)[2]) == 0


def test_incremental_look_up_is_the_rule() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        text = torch.randint(0, 3, (14,), generator=g).tolist()
        drafter = PromptLookup()
        drafter._places, drafter._read = [NGramPlaces(3, 1)], [1]
        for end in range(2, len(text) + 1):
            known = text[:end]
            expected = prompt_lookup(known, drafts=4)
            key = drafter.key(0, known)
            assert (key is None) == (not expected)
            if key is not None:
                n, source, start = drafter._places[0].find(known)
                assert n == key + 1
                assert known[-n:] == source[start - n : start]
                assert source[start] == expected[0]


def test_rows_of_a_prompt_learn_from_each_other() -> None:
    drafter = GroupNGrams()
    places = drafter._per_row([[1, 2], [3], [1, 2]])
    assert places[0] is places[2]
    assert places[0] is not places[1]
    with pytest.raises(ValueError, match="group-ngrams: needs 1 <= shortest"):
        GroupNGrams(shortest=0)
