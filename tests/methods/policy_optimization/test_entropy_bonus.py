"""Entropy bonus."""

from __future__ import annotations

import torch

from methods.policy_optimization.batch import close, gradient, make, rollouts_of, row, signals_of
from tokenloom.methods.policy_optimization.entropy_bonus import entropy_bonus


def test_loss_is_the_negative_entropy() -> None:
    mask = torch.tensor([[True, True, False]])
    entropies = row(0.5, 2.0, float("nan"))
    close(entropy_bonus(entropies, mask), [[-0.5, -2.0, 0.0]])
    close(gradient(lambda x: entropy_bonus(x, mask), entropies)[0], [[-1.0, -1.0, 0.0]])


def test_bonus_pushes_every_sampled_token_up() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 0, 0]])
    signals = signals_of(rollouts, entropies=torch.ones(2, 3).double())
    algorithm = make("grpo", dialect="trl").with_term("entropy-bonus", coef=0.01)
    close(algorithm.coefficients(rollouts, signals)["entropies"], rollouts.mask * 0.01 / 4)
