"""SPO: cut points, chain and tree advantages, the probability mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.batch import Rollouts
from tokenloom.methods.policy_optimization.segment_po import (
    chain_advantages,
    cut_points,
    edges,
    probability_mask,
    segment_po,
    segment_tree,
    skip,
    tree_advantages,
    whiten_unlikely,
)
from tokenloom.methods.policy_optimization.tempo import tree_td

FIRST = row(0.5, 0.95, 0.6, 0.97, 0.4, 0.8).log()
LATE = row(0.95, 0.5, 0.99, 0.6, 0.97, 0.4).log()


def test_defaults() -> None:
    assert defaults("segment-po") == {"threshold": 0.9, "every": 5}
    assert defaults("segment-po/tree") == {"segment": 600, "depth": 3, "divide": False}
    assert defaults("segment-po/edges") == {"segment": 600, "depth": 3}
    assert defaults("segment-po/probability-mask") == {"threshold": 0.9}
    assert defaults("segment-po/whiten") == {"threshold": 0.9, "eps": 1e-8}
    assert defaults("segment-po/skip") == {"limit": 10.0}
    assert preset_defaults("segment-po") == {
        "kind": "chain", "threshold": 0.9, "every": 5, "whitened": True, "segment": 600, "depth": 3, "divide": False,
        "kl_coef": 1e-4, "skip_ratio": None,
        "samples": 0,
    }  # fmt: skip
    (kl,) = make("segment-po").terms
    assert (kl.coef, [w.part.name for w in kl.weight]) == (1e-4, ["segment-po/probability-mask"])
    assert not make("segment-po").needs_refresh


# -- cut points


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 0, 1, 0, 1, 1]), (2, [1, 0, 0, 0, 1, 0]), (5, [1, 0, 0, 0, 0, 0])]
)
def test_every_mth_unlikely_token_cuts(every: int, expected: list[int]) -> None:
    assert cut_points(FIRST, ones(1, 6), every=every).int().tolist() == [expected]


def test_the_sixth_cut_point_is_the_second_cut() -> None:
    assert cut_points(torch.full((1, 12), -1.0), ones(1, 12)).int().tolist() == [[1, 0, 0, 0, 0] * 2 + [1, 0]]
    with pytest.raises(ValueError, match="got 0"):
        cut_points(FIRST, ones(1, 6), every=0)


def test_a_probability_at_the_threshold_is_no_cut_not_zeroed_and_outside_the_loss() -> None:
    logprobs = row(0.5, 0.875, 0.9375).log()  # the middle one exactly at 0.875
    one = ones(1, 3)
    assert logprobs.exp()[0, 1] == 0.875
    assert cut_points(logprobs, one, threshold=0.875, every=1).tolist() == [[True, False, False]]
    close(chain_advantages(row(0.25, NAN, NAN), vector(1), logprobs, one, threshold=0.875), [[0.75, 0.75, 0]])
    close(probability_mask(logprobs, one, threshold=0.875), [[1, 0, 0]])


# -- chains with given values


@pytest.mark.parametrize(
    ("logprobs", "values", "expected"),
    [
        (FIRST, row(0.25, NAN, 0.5, NAN, 0.75, 0.0), [0.25, 0, 0.25, 0, -0.75, 1]),
        (FIRST, row(0.25, NAN, NAN, NAN, 0.75, NAN), [0.5, 0, 0.5, 0, 0.25, 0.25]),
        (LATE, row(NAN, 0.5, NAN, 0.25, NAN, 0.75), [0, -0.25, 0, 0.5, 0, 0.25]),
        (LATE, row(NAN, NAN, NAN, NAN, NAN, NAN), [0] * 6),
    ],
)
def test_chain_worked_numbers(logprobs: Tensor, values: Tensor, expected: list[float]) -> None:
    close(chain_advantages(values, vector(1), logprobs, ones(1, 6)), [expected])


def test_segment_advantages_telescope() -> None:
    g = torch.Generator().manual_seed(0)
    logprobs = torch.full((8, 9), -1.0).double()
    mask = torch.arange(9)[None] < torch.randint(1, 10, (8, 1), generator=g)
    cuts = cut_points(logprobs, mask, every=2)
    values = torch.where(cuts, torch.rand(8, 9, generator=g).double(), torch.full((8, 9), NAN).double())
    rewards = torch.rand(8, generator=g).double()
    found = chain_advantages(values, rewards, logprobs, mask)
    close(torch.where(cuts, found, torch.zeros_like(found)).sum(-1), rewards - values[:, 0])


def test_a_cut_without_a_value_joins_the_segments() -> None:
    whole = chain_advantages(row(0.25, NAN, NAN, NAN, 0.75, NAN), vector(1), FIRST * 0 - 1, ones(1, 6))
    close(whole, [[0.5] * 4 + [0.25] * 2])


def test_values_off_the_mask_and_rows_without_a_reward_give_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.tensor([[0.2, NAN, 0.9], [0.2, NAN, 0.5]], dtype=torch.float64)
    found = chain_advantages(values, vector(1, NAN), torch.full((2, 3), -1.0), mask)
    close(found, [[0.8, 0.8, 0], [0, 0, 0]])


# -- chains with the group's own prefix tree


def grouped(rewards: list[float], tokens: Tensor, groups: list[int] | None = None) -> Rollouts:
    rollouts = rollouts_of(rewards, groups, mask=torch.ones_like(tokens).tolist())
    return rollouts.replace(tokens=tokens)


def test_with_every_token_a_cut_the_chain_is_the_tree_td() -> None:
    g = torch.Generator().manual_seed(3)
    tokens, lengths = torch.randint(0, 2, (12, 4), generator=g), torch.randint(1, 5, (12,), generator=g)
    rewards, group = torch.rand(12, generator=g).double(), torch.randint(0, 2, (12,), generator=g)
    mask = torch.arange(4)[None] < lengths[:, None]
    found = segment_po(rewards, torch.full((12, 4), -1.0).double(), tokens, lengths, group, mask, every=1)
    # A chain ends at R; the tree of TEMPO at the mean of the identical responses. They differ on last tokens only.
    last = torch.arange(4)[None] == lengths[:, None] - 1
    close(found[~last], tree_td(rewards, tokens, lengths, group, mask)[~last])
    zeros = torch.zeros(12).double()
    close(found.sum(-1), rewards - torch.stack([rewards[group == k].mean() for k in group]) + zeros)


def test_without_shared_prefixes_the_first_segment_has_it_all() -> None:
    tokens = torch.tensor([[1, 5, 5, 5], [2, 5, 5, 5]])
    rollouts = grouped([1.0, 0.0], tokens)
    signals = signals_of(rollouts)
    found = advantages_of(make("segment-po", every=2, whitened=False), rollouts, signals)
    close(found, [[0.5, 0.5, 0, 0], [-0.5, -0.5, 0, 0]])


def test_whitening_over_the_tokens_of_the_loss() -> None:
    advantages = row(1, 3, 100, 2)
    logprobs = row(0.5, 0.5, 0.95, 0.5).log()
    found = whiten_unlikely(advantages, logprobs, ones(1, 4), eps=0.0)
    scale = math.sqrt(2 / 3)  # of 1, 3, 2 without Bessel
    close(found, [[-1 / scale, 1 / scale, 0, 0]])


# -- trees

TREE = torch.tensor([[1, 2, 5], [1, 2, 6], [1, 3, 5], [1, 3, 6], [4, 2, 5], [4, 2, 6], [4, 3, 5], [4, 3, 6]])
LEAVES = vector(1, 0, 0, 0, 1, 1, 0, 1)
EDGE_VALUES = [(0.25, 0.5), (0.25, 0.0), (0.75, 1.0), (0.75, 0.5)]  # V after one and after two tokens, pairs of rows


def tree_of(divide: bool = False, row_weights: Tensor | None = None) -> Tensor:
    return tree_advantages(
        LEAVES, TREE, torch.full((8,), 3), torch.zeros(8, dtype=torch.int64), ones(8, 3), row_weights,
        segment=1, depth=3, divide=divide,
    )  # fmt: skip


def test_tree_worked_numbers_and_siblings_sum_to_zero() -> None:
    found = tree_of()
    for i in range(8):
        one, two = EDGE_VALUES[i // 2]
        close(found[i], [one - 0.5, two - one, float(LEAVES[i]) - two])
    # One entry per edge: rows 0, 4 for the first level, even rows for the second, all for the third.
    close(found[[0, 4], 0].sum(), 0.0)
    close(found[0::2, 1].reshape(2, 2).sum(-1), 0.0)
    close(found[:, 2].reshape(4, 2).sum(-1), 0.0)


def test_tree_divided_by_the_std_of_the_children() -> None:
    found = tree_of(divide=True)
    close(found[[0, 4], 0], [-1, 1], 1e-7)  # two children are one population std from their mean
    close(found[:, 1], [1, 1, -1, -1, 1, 1, -1, -1], 1e-7)
    close(found[:, 2], [1, -1, 0, 0, 0, 0, -1, 1], 1e-7)  # equal children: 0 over 1e-8


def test_an_early_leaf_counts_as_one_child() -> None:
    # The root's children: a response that ends after one token (R = 1), and a node with two children (0 and 1).
    tokens, lengths = torch.tensor([[9, 0], [1, 2], [1, 3]]), torch.tensor([1, 2, 2])
    mask = torch.arange(2)[None] < lengths[:, None]
    group, rewards = torch.zeros(3, dtype=torch.int64), vector(1, 0, 1)
    by_branch = tree_advantages(rewards, tokens, lengths, group, mask, vector(0.5, 0.25, 0.25), segment=1, depth=2)
    close(by_branch, [[0.25, 0], [-0.25, -0.5], [-0.25, 0.5]])  # V(root) = (1 + .5) / 2
    by_row = segment_tree(rewards, tokens, lengths, group, mask, segment=1, depth=2)
    close(by_row, [[1 / 3, 0], [-1 / 6, -0.5], [-1 / 6, 0.5]])  # V(root) = 2 / 3, right for independent samples
    divided = tree_advantages(rewards, tokens, lengths, group, mask, vector(0.5, 0.25, 0.25), segment=1, depth=2,
                              divide=True)  # fmt: skip
    close(divided, [[1, 0], [-1, -1], [-1, 1]], 1e-7)


def test_children_weigh_alike_in_the_std_however_many_rows_they_have() -> None:
    # The root's children: leaves with R = 1 and R = 0, and a node of two responses worth .5. V = .5, variance 1 / 6.
    tokens, lengths = torch.tensor([[8, 0, 0], [9, 0, 0], [1, 2, 4], [1, 2, 5]]), torch.tensor([1, 1, 3, 3])
    mask, weights = torch.arange(3)[None] < lengths[:, None], vector(1 / 3, 1 / 3, 1 / 6, 1 / 6)
    found = tree_advantages(
        vector(1, 0, 1, 0), tokens, lengths, torch.zeros(4).long(), mask, weights, segment=1, depth=2, divide=True
    )
    a = 0.5 * math.sqrt(6)
    # The second segment is two tokens long, since it runs to the end; its rows part at the last one.
    close(found, [[a, 0, 0], [-a, 0, 0], [0, 1, 1], [0, -1, -1]], 1e-7)


def test_the_last_segment_runs_to_the_end() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7, 3, 4, 5]])
    found = segment_tree(vector(1, 0, 0), tokens, torch.full((3,), 5), torch.zeros(3).long(), ones(3, 5), segment=2,
                         depth=2)  # fmt: skip
    close(found, [[1 / 6, 1 / 6, 0.5, 0.5, 0.5], [1 / 6, 1 / 6, -0.5, -0.5, -0.5], [-1 / 3, -1 / 3, 0, 0, 0]])
    with pytest.raises(ValueError, match="got 0 and 2"):
        segment_tree(vector(1), tokens[:1], torch.tensor([5]), torch.tensor([0]), ones(1, 5), segment=0, depth=2)


def test_edges_count_once() -> None:
    lengths, group = torch.full((8,), 3), torch.zeros(8, dtype=torch.int64)
    advantages = tree_of()
    found = edges(advantages, TREE, lengths, group, ones(8, 3), segment=1, depth=3)
    wanted = torch.tensor([[1 / 4, 1 / 2, 1]]).double().expand(8, 3) * advantages.ne(0)
    close(found, wanted)
    # Every trained edge weighs one token in the end: two of the first level, four of the second, four leaves.
    close(found.sum(), 10.0)


def test_edges_of_several_tokens_weigh_each_token_alike() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7], [5, 6, 7]])
    advantages = torch.ones(4, 3).double()
    advantages[3, 2] = 0
    found = edges(advantages, tokens, torch.full((4,), 3), torch.zeros(4).long(), ones(4, 3), segment=2, depth=2)
    close(found, [[0.5, 0.5, 1], [0.5, 0.5, 1], [0.5, 0.5, 1], [0.5, 0.5, 0]])


def test_tree_preset_gives_every_edge_the_same_say() -> None:
    rollouts = grouped(LEAVES.tolist(), TREE)
    algorithm = make("segment-po", kind="tree", segment=1, kl_coef=0.0)
    found = coefficients_of(algorithm, rollouts)
    weights = edges(tree_of(), TREE, torch.full((8,), 3), torch.zeros(8).long(), ones(8, 3), segment=1, depth=3)
    close(found, tree_of() * weights / 10)


# -- the whole


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_likely_tokens_leave_loss_and_normalizer(kind: str) -> None:
    rollouts = grouped([1.0, 0.0], torch.tensor([[1, 2], [3, 4]]))
    old = torch.tensor([[0.5, 0.95], [0.5, 0.5]]).log().double()
    signals = signals_of(rollouts).replace(old_logprobs=old, logprobs=old)
    algorithm = make("segment-po", kind=kind, every=1, segment=2, whitened=False, kl_coef=0.0)
    found = coefficients_of(algorithm, rollouts, signals)
    assert found[0, 1] == 0
    if kind == "chain":  # row 1's second token has A = 0 but counts: three tokens
        close(found, [[0.5 / 3, 0], [-0.5 / 3, 0]])
    else:  # the whole response is one segment
        close(found, [[0.5 / 3, 0], [-0.5 / 3, -0.5 / 3]])


def test_a_constant_group_moves_nothing() -> None:
    rollouts = grouped([0.1] * 4, torch.tensor([[1, 2], [1, 3], [1, 2], [4, 5]]))
    for kind in ("chain", "tree"):
        found = coefficients_of(make("segment-po", kind=kind, segment=1, every=1, kl_coef=0.0), rollouts)
        assert bool((found == 0).all())


def test_a_batch_that_drifted_is_skipped() -> None:
    mask = ones(1, 3)
    close(skip(row(1, 2, 3), row(8, 10, 12), mask), [[1, 2, 3]])
    close(skip(row(1, 2, 3), row(8, 10, 12.1), mask), 0.0)
    close(skip(row(1, 2, 3), row(8, 10, INF), torch.tensor([[True, True, False]])), [[1, 2, 0]])
    rollouts = grouped([1.0, 0.0], torch.tensor([[1, 2], [3, 4]]))
    algorithm = make("segment-po", kl_coef=0.0, skip_ratio=1.5)
    assert algorithm.needs_refresh
    near, far = (coefficients_of(algorithm, rollouts, signals_of(rollouts, math.log(r))) for r in (1.1, 2.0))
    assert float(near.abs().sum()) > 0
    close(far, 0.0)


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        ({"every": 1}, {"advantage": {"every": 3}}),
        ({"every": 2}, {"weight": None}),
        ({"every": 2}, {"credit": None}),
        ({"kind": "tree", "segment": 2}, {"advantage": {"segment": 1}}),
        ({"kind": "tree", "segment": 2}, {"weight": {"segment-po/edges": None}}),
    ],
)
def test_mechanism_shows_on_the_batch(settings: dict[str, object], without: dict[str, object]) -> None:
    rollouts, signals = synthetic_batch()
    # Two token ids, so that responses share prefixes.
    rollouts = rollouts.replace(tokens=rollouts.tokens % 2)
    algorithm = make("segment-po", **settings)
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(**without)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)
