"""Sequence mean of token means."""

from __future__ import annotations

import torch

from methods.policy_optimization.batch import close, defaults
from tokenloom.methods.policy_optimization.sequence_mean import sequence_mean
from tokenloom.methods.policy_optimization.token_mean import token_mean

MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])


def test_every_response_counts_alike() -> None:
    assert defaults("sequence-mean") == {"count": "mask", "rows": "live"}
    found = sequence_mean(MASK)
    close(found, [[1 / 6, 1 / 6, 0, 1 / 6], [1 / 2, 0, 0, 0], [0] * 4], 1e-7)
    close(found.sum(-1), [0.5, 0.5, 0.0])


def test_trl_counts_empty_rows() -> None:
    close(sequence_mean(MASK, rows="all"), sequence_mean(MASK) * 2 / 3, 1e-7)


def test_weights_as_lengths() -> None:
    weights = torch.tensor([[0.5, 0.0, 7.0, 1.5], [0.0, 7.0, 7.0, 7.0], [7.0] * 4])
    # Row 0 weighs 2, row 1 nothing: it is no live row.
    close(sequence_mean(MASK, weights, count="weights"), [[0.5, 0.5, 0, 0.5], [0] * 4, [0] * 4])


def test_equal_lengths_make_it_the_token_mean() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    close(sequence_mean(mask), token_mean(mask))


def test_nothing_sampled() -> None:
    close(sequence_mean(torch.zeros(2, 3, dtype=torch.bool)), 0.0)
