"""What an algorithm's training step needs of a policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.signals import Signals


class PolicyLike(Protocol):
    """A model seen as a policy: signals out, gradients in."""

    def signals(self, rollouts: Rollouts, needs: Sequence[str], *, grad: bool = False) -> Signals:
        """Exactly the signals named in `needs`, [B, T], zero off the mask; with gradient if `grad`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar made of the signals to the trainable parameters."""
        ...


@dataclass(frozen=True)
class Gathered:
    """Hidden states of some response tokens: `hidden` [N, D] predicts the tokens at `rows`, `columns` [N]."""

    hidden: Tensor
    rows: Tensor
    columns: Tensor


class Forward(Protocol):
    """A way to get the hidden states that predict response tokens: padded rows, or prefix trees."""

    def gather(self, trunk: Trunk, rollouts: Rollouts) -> Iterator[Gathered]:
        """Every sampled token (`rollouts.mask`) of the batch exactly once, in as many parts as fit."""
        ...

    def split(self, rollouts: Rollouts, token_budget: int) -> list[Tensor]:
        """Rows [n_i] int64 of micro-batches that cost at most about `token_budget` computed tokens each.

        Rows without a sampled token are left out; every other row is in exactly one part.
        """
        ...


class Trunk(Protocol):
    """Last hidden states [B, S, D] of token rows [B, S].

    Without `mask` and `positions` attention is causal and each row starts at position 0.
    """

    def __call__(self, tokens: Tensor, *, mask: Any = None, positions: Tensor | None = None) -> Tensor: ...
