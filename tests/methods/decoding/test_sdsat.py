"""SDSAT: what is inserted where, what it sees and predicts, the loss."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.sdsat import IGNORED, insert, loss, sdsat

ROW = torch.tensor([10, 11, 12, 13, 14])


def test_a_block_stands_behind_its_token() -> None:
    made = insert(ROW, [1, 3], (90, 91))
    assert made.ids.tolist() == [10, 11, 12, 13, 14, 90, 91, 90, 91]
    assert made.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    # a_j behind y_t predicts y_(t+1+j); the token y_(t+1) itself is the text's to predict.
    assert made.labels.tolist() == [11, 12, 13, 14, IGNORED, 13, 14, IGNORED, IGNORED]
    assert made.visible[:5, :5].equal(torch.ones(5, 5).tril().bool())
    assert not bool(made.visible[:5, 5:].any())
    assert made.visible[5].nonzero().flatten().tolist() == [0, 1, 5]
    assert made.visible[6].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert made.visible[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 7, 8]


def test_no_block_is_the_row() -> None:
    made = insert(ROW, [], (90,))
    assert made.ids.equal(ROW)
    assert made.labels.tolist() == [11, 12, 13, 14, IGNORED]
    assert made.visible.shape == (5, 5)


def test_the_loss_is_the_sum_of_two_means() -> None:
    logits = torch.zeros(1, 4, 8)
    logits[0, 2:, 3] = 20.0
    labels = torch.tensor([[1, IGNORED, 3, 3]])
    adaptive = torch.tensor([[False, False, True, True]])
    assert float(loss(logits, labels, adaptive)) == pytest.approx(math.log(8), abs=1e-6)
    assert float(loss(logits, labels, ~adaptive)) == pytest.approx(math.log(8), abs=1e-6)
    logits[0, 3] = 0
    assert float(loss(logits, labels, adaptive, weight=2.0)) == pytest.approx(2 * math.log(8), abs=1e-6)
    assert float(loss(logits, torch.full((1, 4), IGNORED), adaptive)) == 0


def test_drafts_are_the_most_probable_tokens() -> None:
    scores = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1]])
    assert sdsat(scores) == [1, 0, 2]
    assert sdsat(scores, drafts=2) == [1, 0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"places in 0 \.\.\. 4"):
        insert(ROW, [5], (90,))
    with pytest.raises(ValueError, match="adaptive tokens"):
        insert(ROW, [0], ())
    with pytest.raises(ValueError, match="weight"):
        loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1).bool(), weight=-1.0)
