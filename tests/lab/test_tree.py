"""The prefix tree against plain enumeration with itertools."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenloom.lab.tree import Tree

TREES = [Tree(3, 4), Tree(2, 1), Tree(4, 3, end=True), Tree(2, 3, end=True)]


def responses(tree: Tree) -> set[tuple[int, ...]]:
    """Every complete response, spelled out."""
    full = list(itertools.product(range(tree.branching), repeat=tree.horizon))
    ended = [
        (*prefix, tree.vocab - 1)
        for depth in range(tree.horizon if tree.end else 0)
        for prefix in itertools.product(range(tree.branching), repeat=depth)
    ]
    return {*full, *ended}


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_enumeration_is_every_response_once(tree: Tree) -> None:
    tokens, lengths = tree.enumerated
    found = [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
    assert len(found) == len(set(found)) == tree.responses
    assert set(found) == responses(tree)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_states_of_a_response_are_its_prefixes(tree: Tree) -> None:
    tokens, lengths = tree.enumerated
    states = tree.states_of(tokens)
    assert len(tree.prefixes) == len(tree.depth) == tree.states
    for row, length, at in zip(tokens.tolist(), lengths.tolist(), states.tolist(), strict=True):
        for t in range(length):
            assert tree.prefixes[at[t]].tolist() == row[:t] + [-1] * (tree.horizon - t)
            assert int(tree.depth[at[t]]) == t
    assert int(states.min()) == 0
    assert int(states.max()) < tree.states


def test_tokens_past_the_end_do_not_leave_the_tree() -> None:
    tree = Tree(3, 3, end=True)
    hostile = torch.tensor([[2, 999, -7], [0, 2, 2]])
    states = tree.states_of(hostile)
    assert int(states.min()) >= 0
    assert int(states.max()) < tree.states


def test_the_largest_tree_is_allowed_and_no_larger() -> None:
    assert Tree(2, 17).responses == 2**17
    with pytest.raises(ValueError, match=r"262144 responses are too many.*lower vocab=2 or horizon=18"):
        Tree(2, 18)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Tree(1, 3)
