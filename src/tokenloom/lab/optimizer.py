"""The one optimizer of the laboratory: every batch moves the parameters equally far, in root mean square.

s = sum of the gradients of a batch's updates;  v = running mean of |s|^2 over batches
theta <- theta - length * g / sqrt(v)                                                  for each update's gradient g

So neither the scale on which a method states its loss, nor a learning rate tuned for one of them, nor the number of
updates that a batch is cut into decides, and a batch's noise takes from what it moves along the gradient. There is one
number for all parameters, where Adam has one for each: dividing entry by entry would make rarely visited states of a
table move like frequent ones. Batches without gradient do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ScaleFree:
    """`begin` a batch of so many updates, then `step` for each. `decay` is that of the running mean."""

    def __init__(self, parameters: Sequence[Tensor], length: float, decay: float = 0.99) -> None:
        self.parameters, self.length, self.decay = list(parameters), length, decay
        self._sum = [torch.zeros_like(p) for p in self.parameters]
        self._square, self._batches = 0.0, 0
        self._made, self._updates = 0, 1

    def begin(self, updates: int) -> None:
        """A batch of `updates` updates begins; the one before is complete."""
        if (size := self._size()) > 0:
            self._square, self._batches = self.decay * self._square + (1 - self.decay) * size, self._batches + 1
        for total in self._sum:
            total.zero_()
        self._made, self._updates = 0, updates

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move against the gradients of one update."""
        self._made += 1
        for total, gradient in zip(self._sum, gradients, strict=True):
            total.add_(gradient)
        # What the whole batch will sum to, if the updates still to come are as independent as those made.
        size = self._size() * self._updates / self._made
        if size == 0:
            return
        square = self.decay * self._square + (1 - self.decay) * size
        rate = self.length / (square / (1 - self.decay ** (self._batches + 1))) ** 0.5
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)

    def _size(self) -> float:
        return sum(float((total * total).sum()) for total in self._sum)
