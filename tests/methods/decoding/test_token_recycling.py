"""Token Recycling: the paper's template, trees from the matrix, its update."""

from __future__ import annotations

from collections import Counter

import torch

from tokenloom.decode.drafters.base import largest
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.methods.decoding.draft_tree import ROOT
from tokenloom.methods.decoding.token_recycling import NONE, TEMPLATE, empty_adjacency, token_recycling, update


def test_the_template_is_the_papers() -> None:
    shape = Shape(*TEMPLATE)
    assert len(shape) == 80
    assert Counter(shape.depths) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    children = Counter(TEMPLATE[0])
    assert children[ROOT] == 8
    firsts = [node for node, parent in enumerate(TEMPLATE[0]) if parent == ROOT]
    assert [children[node] for node in firsts] == [8, 4, 3, 2, 1, 1, 1, 1]


def test_nodes_hold_what_followed_their_parent() -> None:
    matrix = torch.randint(0, 30, (30, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for row in matrix:  # different followers, as the target's best eight are
        row[:] = torch.randperm(30, generator=torch.Generator().manual_seed(int(row[0])))[:8]
    tree = token_recycling(matrix, 7)
    assert len(tree) == 80
    assert list(tree.parents) == TEMPLATE[0]
    for node, (parent, rank) in enumerate(zip(*TEMPLATE, strict=True)):
        above = 7 if parent == ROOT else tree.tokens[parent]
        assert tree.tokens[node] == int(matrix[above, rank])


def test_what_is_unknown_or_repeated_is_left_out() -> None:
    matrix = empty_adjacency(5, branches=3)
    assert len(token_recycling(matrix, 0)) == 0
    matrix[0] = torch.tensor([1, 1, 2])
    matrix[1] = torch.tensor([0, NONE, NONE])
    tree = token_recycling(matrix, 0, ([ROOT, 0, ROOT, 2, ROOT], [0, 0, 1, 0, 2]))
    assert list(tree.tokens) == [1, 0, 2]
    assert list(tree.parents) == [ROOT, 0, ROOT]


def test_the_last_of_equal_tokens_writes_its_best_eight() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    matrix = empty_adjacency(50)
    assert update(matrix, torch.tensor([3, 5, 3, 9]), largest(scores, 8)[1]) is matrix
    for token, node in ((3, 2), (5, 1), (9, 3)):
        assert matrix[token].tolist() == scores[node].topk(8).indices.tolist()
    assert int((matrix != NONE).any(-1).sum()) == 3
