"""The unclipped surrogate."""

from __future__ import annotations

import torch

from methods.policy_optimization.batch import close, gradient, ones, row
from tokenloom.methods.policy_optimization.importance import importance, where_advantages


def test_objective_and_gradient_are_ratio_times_advantage() -> None:
    log_ratio, advantages = row(2.0, 0.25, 1.0).log(), row(3.0, -2.0, 0.0)
    close(importance(log_ratio, advantages, ones(1, 3)), [[6.0, -0.5, 0.0]])
    close(gradient(lambda x: importance(x, advantages, ones(1, 3)), log_ratio)[0], [[6.0, -0.5, 0.0]])


def test_log_ratio_is_guarded_at_twenty() -> None:
    log_ratio = row(25.0, -25.0)
    close(importance(log_ratio, row(1.0, 1.0), ones(1, 2)), [[485165195.40979, 2.0611536e-9]], 1e-6)
    close(gradient(lambda x: importance(x, row(1.0, 1.0), ones(1, 2)), log_ratio)[0], 0.0)


def test_advantages_pass_no_gradient() -> None:
    mask = torch.tensor([[True, False]])
    advantages = row(2.0, float("nan")).requires_grad_()
    found = where_advantages(advantages, mask)
    assert not found.requires_grad
    close(found, [[2.0, 0.0]])
