"""Token mean."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import close, defaults
from tokenloom.methods.policy_optimization.token_mean import counted_tokens, token_mean

MASK = torch.tensor([[True, True, True], [True, False, False]])
WEIGHTS = torch.tensor([[0.5, 0.0, 1.0], [2.5, 9.0, 9.0]])


def test_every_token_counts_alike() -> None:
    assert defaults("token-mean") == {"count": "mask"}
    close(token_mean(MASK), MASK * 0.25)
    close(token_mean(MASK, WEIGHTS), MASK * 0.25)


def test_selected_tokens_only() -> None:
    close(token_mean(MASK, WEIGHTS, count="weights"), MASK * 0.25)  # 0.5 + 1 + 2.5 = 4
    close(token_mean(MASK, WEIGHTS / 100, count="weights"), MASK * 25.0, 1e-6)
    close(token_mean(MASK, torch.zeros(2, 3), count="weights") * 0, 0.0)


def test_counting_weights_needs_them() -> None:
    with pytest.raises(ValueError, match="weights"):
        counted_tokens(MASK, None, "weights")


def test_nothing_sampled() -> None:
    close(token_mean(torch.zeros(2, 3, dtype=torch.bool)), 0.0)
