"""Balanced aggregation: signs keep their share of rows, tokens of a sign count alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    make,
    rollouts_of,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.balanced_aggregation import balanced_aggregation
from tokenloom.methods.policy_optimization.sequence_mean import sequence_mean
from tokenloom.methods.policy_optimization.token_mean import token_mean


def ragged(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def rows_of(values: list[float], mask: Tensor) -> Tensor:
    return mask * torch.tensor(values, dtype=torch.float64)[:, None]


def test_preset_is_grpo_with_another_scale() -> None:
    algorithm = make("balanced-aggregation")
    assert algorithm.override(aggregate="sequence-mean").recipe() == make("grpo", kl_coef=0.0).recipe()


def test_worked_objective() -> None:
    mask = ragged(2, 4, 2)
    objective, signs = rows_of([1.0, -1.0, -3.0], mask), rows_of([1.0, -0.5, -0.5], mask)
    group = torch.zeros(3, dtype=torch.int64)
    balanced = balanced_aggregation(mask, group, signs)
    close((balanced * objective).sum(), -0.777778, 1e-6)
    close((balanced * objective).sum(), 1 / 3 - 2 / 3 * 10 / 6)
    close((sequence_mean(mask, signs) * objective).sum(), -1.0)
    close((token_mean(mask, signs) * objective).sum(), -1.0)


def test_equal_lengths_are_both_means() -> None:
    mask, groups = torch.ones(6, 4, dtype=torch.bool), torch.tensor([5, 1, 5, 1, 1, 5])
    signs = rows_of([1.0, -1.0, -0.2, 0.4, 0.4, -0.2], mask)
    found = balanced_aggregation(mask, groups, signs)
    close(found, token_mean(mask, signs))
    close(found, sequence_mean(mask, signs))


def test_objective_constant_within_a_side_is_the_sequence_mean() -> None:
    mask, group = ragged(1, 7, 3, 5, 2), torch.zeros(5, dtype=torch.int64)
    signs = rows_of([0.5, -1.0, 0.5, -1.0, -1.0], mask)
    for objective in (signs, 3 * signs + 0.7 * mask):
        balanced = (balanced_aggregation(mask, group, signs) * objective).sum()
        close(balanced, (sequence_mean(mask, signs) * objective).sum())


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1), (1, 7, 3, 5, 2), (9, 1, 1, 1, 4)])
def test_mass_of_a_side_is_its_share_of_rows_whatever_the_lengths(lengths: tuple[int, ...]) -> None:
    mask, groups = ragged(*lengths), torch.tensor([3, 8, 3, 3, 8])
    signs = rows_of([2.0, 1.0, -1.0, -1.0, -1.0], mask)
    found = balanced_aggregation(mask, groups, signs)
    # Group 3 has one of three rows positive, group 8 one of two.
    close(found.sum(-1)[0], 1 / 6)
    close(found[2:4].sum(), 2 / 6)
    close(found.sum(-1)[[1, 4]], [1 / 4, 1 / 4])
    negative = found[2:4][mask[2:4]]
    close(negative, negative[0].expand(negative.shape))


def test_token_mean_couples_sign_and_length_and_this_does_not() -> None:
    # Two long wrong rows and two short right ones: under the token mean the wrong ones weigh nine times as much.
    rollouts = rollouts_of([1.0, 1.0, 0.0, 0.0], mask=[[1] + [0] * 8, [1] + [0] * 8, [1] * 9, [1] * 9])
    for aggregate, heavier in (("token-mean", 9.0), ("balanced-aggregation", 1.0), ("sequence-mean", 1.0)):
        found = coefficients_of(make("balanced-aggregation").override(aggregate=aggregate), rollouts)
        close(found[2:].sum() / found[:2].sum(), -heavier, 1e-9)


def test_one_side_empty() -> None:
    mask, group = ragged(3, 1), torch.zeros(2, dtype=torch.int64)
    for sign in (1.0, -1.0):
        close(balanced_aggregation(mask, group, rows_of([sign, sign], mask)), mask.double() / 4)


def test_rows_without_advantage_are_counted_and_do_not_dilute_the_sides() -> None:
    mask, group = ragged(2, 1, 3), torch.zeros(3, dtype=torch.int64)
    found = balanced_aggregation(mask, group, rows_of([1.0, -1.0, 0.0], mask))
    close(found.sum(-1), [1 / 3, 1 / 3, 1 / 3])
    rollouts = rollouts_of([1.0, 0.0, 0.5], mask=mask.tolist())
    close(coefficients_of(make("balanced-aggregation"), rollouts)[2], 0.0)


def test_terms_see_rows_without_advantage() -> None:
    rollouts = rollouts_of([1.0, 1.0], mask=[[1, 1, 1], [1, 0, 0]])
    signals = signals_of(rollouts, ref_logprobs=torch.full((2, 3), -1.5, dtype=torch.float64))
    found = coefficients_of(make("balanced-aggregation").with_term("kl", coef=1.0), rollouts, signals)
    assert bool((found[rollouts.mask] < 0).all())


def test_groups_count_alike_and_a_silent_group_counts_too() -> None:
    mask, groups = ragged(4, 1, 2, 2, 1), torch.tensor([0, 0, 1, 1, 1])
    found = balanced_aggregation(mask, groups, rows_of([1.0, -1.0, 0.0, 0.0, 0.0], mask))
    close(found[:2].sum(), 0.5)
    close(found[2:].sum(), 0.5)


def test_sign_is_the_rows_own_when_tokens_differ() -> None:
    mask, group = ragged(3, 3), torch.zeros(2, dtype=torch.int64)
    mixed = torch.tensor([[2.0, -0.5, -0.5], [-1.0, 0.2, 0.2]], dtype=torch.float64)
    close(balanced_aggregation(mask, group, mixed), mask.double() / 6)


def test_empty_rows_and_padding() -> None:
    mask = torch.tensor([[True, False, True], [False] * 3, [True, True, False]])
    signs = torch.tensor([[1.0, NAN, 1.0], [NAN] * 3, [-1.0, -1.0, NAN]], dtype=torch.float64)
    found = balanced_aggregation(mask, torch.tensor([4, 4, 4]), signs)
    close(found, [[0.25, 0, 0.25], [0, 0, 0], [0.25, 0.25, 0]])
    alone = balanced_aggregation(mask, torch.tensor([4, 9, 4]), signs)
    close(alone, found)
    assert bool((balanced_aggregation(mask & False, torch.tensor([4, 4, 4]), signs) == 0).all())


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("balanced-aggregation")
    found = coefficients_of(algorithm, rollouts, signals)
    for other in ("token-mean", "sequence-mean"):
        assert not torch.allclose(found, coefficients_of(algorithm.override(aggregate=other), rollouts, signals))
    # Only the scale differs: per token, the coefficients are proportional where they are not zero.
    plain = coefficients_of(algorithm.override(aggregate="token-mean"), rollouts, signals)
    assert torch.equal(found == 0, plain == 0)
    assert torch.equal(found.sign(), plain.sign())
