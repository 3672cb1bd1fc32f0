"""ICN: which tokens are new, k-means of keys, and the gap between clusters."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.icn import cluster_gap, key_clusters, unexplored

SCORES = torch.tensor([0.1, 3.0, 2.0, 3.0, -1.0, 1.0])


def test_first_round_is_the_best_tokens() -> None:
    assert unexplored(SCORES, [], n_tol=3) == [1, 3, 2]
    assert unexplored(SCORES, [], n_tol=9) == [1, 3, 2, 5, 0, 4]
    assert unexplored(SCORES, [], n_tol=9, pool=2) == [1, 3]


def test_explored_names_are_skipped_and_names_differ() -> None:
    assert unexplored(SCORES, [1, 2], n_tol=2) == [3, 5]
    text = {0: "a", 1: "b", 2: "c", 3: "b", 4: "a", 5: "d"}
    assert unexplored(SCORES, ["d"], text.__getitem__, n_tol=9) == [1, 2, 0]
    assert unexplored(SCORES, range(6)) == []


def test_clusters_find_separate_clouds_and_are_deterministic() -> None:
    g = torch.Generator().manual_seed(0)
    centers = torch.tensor([[20.0, 0.0], [0.0, 20.0], [-20.0, -20.0]])
    rows = (centers[:, None] + torch.randn(3, 10, 2, generator=g)).reshape(30, 2)
    for seed in range(20):
        found = [key_clusters(rows, torch.Generator().manual_seed(seed), k=3) for _ in range(2)]
        assert torch.equal(found[0], found[1])
    # From starting rows in three clouds it finds exactly the clouds.
    groups = key_clusters(rows, torch.Generator().manual_seed(_good_seed()), k=3).view(3, 10)
    assert all(len(set(g.tolist())) == 1 for g in groups)
    assert len(set(groups[:, 0].tolist())) == 3


def _good_seed() -> int:
    for seed in range(100):
        at = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:3]
        if len(set((at // 10).tolist())) == 3:
            return seed
    raise AssertionError("no seed of a hundred")


def test_every_row_its_own_cluster() -> None:
    rows = torch.arange(8, dtype=torch.float64)[:, None]
    assert sorted(key_clusters(rows, torch.Generator().manual_seed(0), k=8).tolist()) == list(range(8))


def test_gap_by_hand() -> None:
    clusters = torch.tensor([0, 0, 1, 1])
    tokens = torch.tensor([[0, 1, 2], [2, 0, 3]])
    correct = torch.tensor([[True, False, True], [True, True, False]])
    assert cluster_gap(tokens, correct, clusters) == (0.0, 1.0)
    inside, outside = cluster_gap(tokens[:, :1], correct[:, :1], clusters)
    assert math.isnan(inside)
    assert math.isnan(outside)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="n_tol >= 1"):
        unexplored(SCORES, [], n_tol=0)
    with pytest.raises(ValueError, match="k = 9"):
        key_clusters(torch.ones(3, 2), torch.Generator(), k=9)
