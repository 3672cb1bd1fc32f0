"""The token ratio."""

from __future__ import annotations

import torch

from methods.policy_optimization.batch import close, gradient, ones, row
from tokenloom.methods.policy_optimization.token_ratio import token_ratio


def test_difference_of_log_probs() -> None:
    close(token_ratio(row(-1.0, -0.5), row(-1.5, -0.25), ones(1, 2)), [[0.5, -0.25]])


def test_exactly_zero_with_unit_gradient_on_policy() -> None:
    logprobs = -torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) * 9
    assert bool((token_ratio(logprobs, logprobs.clone(), ones(3, 7)) == 0).all())
    close(gradient(lambda x: token_ratio(x, logprobs, ones(3, 7)), logprobs)[0], 1.0)


def test_old_log_probs_pass_no_gradient_and_padding_no_value() -> None:
    old = row(-1.0, float("-inf")).requires_grad_()
    found = token_ratio(row(-2.0, float("nan")), old, torch.tensor([[True, False]]))
    assert not found.requires_grad
    close(found, [[-1.0, 0.0]])
