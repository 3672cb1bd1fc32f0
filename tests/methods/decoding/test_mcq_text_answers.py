"""Text answers and first tokens: measures at their limits and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.mcq_text_answers import (
    agreement,
    consistency,
    content_entropy,
    contents_of,
    first_token_answer,
    letter_logprobs,
    mismatch_rate,
)
from tokenloom.methods.decoding.pride import cyclic_orders, recall_std


def test_mismatch_counts_refusals() -> None:
    assert mismatch_rate(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, -1])) == 0.5


def test_tokens_of_a_letter_add_up() -> None:
    scores = torch.tensor([[0.4, 0.35, 0.25, 1.0]], dtype=torch.float64).log()
    letters = [[0], [1, 2]]
    assert first_token_answer(scores, letters).tolist() == [1]
    torch.testing.assert_close(letter_logprobs(scores, letters).exp(), torch.tensor([[0.2, 0.3]], dtype=torch.float64))
    assert first_token_answer(torch.zeros(1, 4), [[2], [3]]).tolist() == [0]


@pytest.mark.parametrize("n", [2, 4, 5])
def test_a_model_that_follows_contents_is_consistent(n: int) -> None:
    orders = torch.tensor(cyclic_orders(n))
    truth = torch.arange(n)  # sample q's right content is q, and the model finds it wherever it stands
    choices = (orders[None] == truth[:, None, None]).long().argmax(-1)
    contents = contents_of(choices, orders)
    assert torch.equal(contents, truth[:, None].expand(n, n))
    assert agreement(contents) == consistency(contents) == 1
    assert content_entropy(contents) == 0
    assert recall_std(choices.flatten(), choices.flatten(), n) == 0


@pytest.mark.parametrize("n", [2, 4, 5])
def test_a_model_that_always_says_a_agrees_with_itself_once_in_n(n: int) -> None:
    contents = contents_of(torch.zeros(3, n, dtype=torch.int64), torch.tensor(cyclic_orders(n)))
    assert agreement(contents) == pytest.approx(1 / n)
    assert consistency(contents) == 0
    assert content_entropy(contents) == pytest.approx(math.log(n))


def test_between_the_limits_by_hand() -> None:
    contents = torch.tensor([[1, 1, 2, -1]])
    assert agreement(contents) == 0.5
    assert consistency(contents) == pytest.approx(1 / 6)  # 1 of 6 pairs
    assert content_entropy(contents) == pytest.approx(1.5 * math.log(2))


def test_refusals_stay_refusals() -> None:
    orders = torch.tensor(cyclic_orders(3))
    assert contents_of(torch.tensor([[0, -1, 2]]), orders).tolist() == [[0, -1, 1]]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="keeps apart"):
        letter_logprobs(torch.zeros(1, 4), [[1], [1]])
    with pytest.raises(ValueError, match="at least two"):
        consistency(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="two answers per sample"):
        mismatch_rate(torch.zeros(2), torch.zeros(3))
