"""TreeRanker: children, the score of ending, and the order after a walk."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.treeranker import END, child_scores, children_of, ranking


def test_children_of_a_trie() -> None:
    completions = [(1, 2), (1, 3, 4), (1,), (5,)]
    assert children_of(completions, ()) == [1, 5]
    assert children_of(completions, (1,)) == [END, 2, 3]
    assert children_of(completions, (1, 3)) == [4]
    assert children_of(completions, (5,)) == [END]


def test_ending_is_scored_by_what_is_no_child_or_by_delimiters() -> None:
    logprobs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    assert child_scores(logprobs, [1, 2]).exp().tolist() == pytest.approx([0.2, 0.3])
    assert child_scores(logprobs, [END, 1, 2]).exp().tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert child_scores(logprobs, [END, 1, 2], [0, 1]).exp().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert child_scores(logprobs, [END, 0, 1, 2, 3])[0] == -torch.inf


def test_order_by_shared_path_then_divergence_then_given_order() -> None:
    completions = [(7,), (1, 3), (1, 2, 5), (6,), (1, 2, 4), (7, 8)]
    visited = {(): {1: -0.1, 6: -3.0, 7: -2.0}, (1,): {2: -0.2, 3: -1.0}, (1, 2): {4: -0.3, 5: -0.9}}
    assert ranking(completions, (1, 2, 4, END), visited) == [4, 2, 1, 0, 5, 3]


def test_equal_completions_keep_their_order() -> None:
    assert ranking([(1,), (2,), (1,)], (2, END), {(): {1: -1.0, 2: -0.5}}) == [1, 0, 2]
