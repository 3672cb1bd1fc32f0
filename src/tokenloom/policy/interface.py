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
    """States that predict some response tokens: `hidden` [M, D], each distinct state once.

    `rows`, `columns` [N] int64 are the tokens, `at` [N] int64 which state predicts each; None when the n-th does.
    A shared prefix predicts the next token of every row that shares it.
    """

    hidden: Tensor
    rows: Tensor
    columns: Tensor
    at: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """[N, D]: the state that predicts each token."""
        # Not hidden[at]: its backward adds the gradients of a shared state in the order in which threads come by.
        return self.hidden if self.at is None else self.hidden.index_select(0, self.at)


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
