"""A critic as a table: exact values by decree, or values that learn from the algorithm's own value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.lab.task import places
from tokenloom.lab.tree import Tree

LEARNING_RATE = 0.05
"""Adam moves a visited value by about this much per step: a critic of rewards in [0, 1] follows within 20 steps."""


class Critic:
    """`values` [P, S], one for each prompt and state, before the token is taken."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach().clone().requires_grad_()
        self._adam = torch.optim.Adam([self.values], lr=LEARNING_RATE)

    def at(self, tree: Tree, rollouts: Rollouts) -> Tensor:
        """[B, T]: the value before each token."""
        return self.values.reshape(-1)[places(tree, rollouts)]

    def set(self, values: Tensor) -> None:
        """Take over `values` [P, S]."""
        self.values.data.copy_(values)

    def step(self, gradient: Tensor) -> None:
        """One step against the gradient [P, S] of the value loss."""
        self.values.grad = gradient
        self._adam.step()
