"""What the laboratory asks of a policy, a table or a tiny transformer alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.lab.critic import Critic
from tokenloom.lab.optimizer import ScaleFree
from tokenloom.signals import Signals


class LabPolicy(Protocol):
    """A policy over a prefix tree that can be enumerated."""

    critic: Critic

    @property
    def parameters(self) -> list[Tensor]:
        """What the policy's gradient is taken with respect to; the critic apart."""
        ...

    def table(self) -> Tensor:
        """The logits of every state, [P, S, V] float64, without gradient."""
        ...

    def pull_back(self, gradient: Tensor) -> Tensor:
        """[D]: the gradient with respect to all parameters of what has `gradient` [P, S, V] at the table."""
        ...

    def signals(
        self, rollouts: Rollouts, needs: Sequence[str], *, grad: bool = False, given: dict[str, Tensor] | None = None
    ) -> Signals:
        """The signals named in `needs`; `given` are those taken before the update, for signals that read them."""
        ...

    def moved(self, spread: float, generator: torch.Generator) -> Self:
        """A copy whose logits differ by noise of about `spread` nats."""
        ...

    def copy(self) -> Self:
        """The policy as it is now; the critic is shared."""
        ...

    def optimizer(self) -> ScaleFree:
        """A new optimizer of `parameters`."""
        ...
