"""Min-p."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper

from tests.methods.decoding.truncation import P, agree, kept
from tokenloom.methods.decoding.min_p import min_p


def test_worked_numbers() -> None:
    assert kept(min_p(P, min_p=0.3)) == [0, 1, 2]
    assert kept(min_p(P, min_p=0.4)) == [0, 1]
    assert kept(min_p(P, min_p=1.0)) == [0]
    assert kept(min_p(P, min_p=0.0)) == [0, 1, 2, 3, 4]
    assert kept(min_p(torch.full((1, 3), 1 / 3), min_p=1.0)) == [0, 1, 2]


def test_removing_other_tokens_changes_nothing() -> None:
    fewer = P[:, [0, 2, 3]]
    assert torch.equal(min_p(fewer / fewer.sum(), min_p=0.25), min_p(P, min_p=0.25)[:, [0, 2, 3]])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.7])
def test_transformers_keeps_the_same(share: float) -> None:
    agree(lambda p: min_p(p, min_p=share), MinPLogitsWarper(share))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share of the largest"):
        min_p(P, min_p=share)
