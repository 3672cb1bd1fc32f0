"""The frozen model that KL terms compare with: the policy as it was at load."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tokenloom.policy import lora
from tokenloom.policy.head import LogprobHead
from tokenloom.policy.own_logits import trunk_of

log = logging.getLogger(__name__)


class Reference:
    """Under LoRA the same model with adapters switched off; otherwise a copy, made when first asked for.

    `read_again` gives the initial model anew, for when the weights have changed before the copy was
    made (a resumed run); None if it cannot be read.
    """

    def __init__(self, model: Any, head: LogprobHead, read_again: Callable[[], nn.Module] | None) -> None:
        self._model, self._head, self._read_again = model, head, read_again
        self._copy: LogprobHead | None = None
        self._initial = self._versions()

    @contextmanager
    def active(self) -> Iterator[tuple[nn.Module, LogprobHead]]:
        """The reference's trunk and head; only valid inside the context."""
        head = self.head()
        trunk = trunk_of(cast(nn.Module, head.causal))
        if lora.is_lora(self._model):
            with lora.adapters_off(self._model):
                yield trunk, head
        else:
            yield trunk, head

    def head(self) -> LogprobHead:
        """The reference's head, valid at any time: adapters never reach the head.

        Raises:
            ValueError: when the weights have changed and the initial ones cannot be read again.
        """
        if lora.is_lora(self._model):
            return self._head
        if self._copy is None:
            frozen = self._initial_model().eval().requires_grad_(False)
            self._copy = LogprobHead(frozen, chunk_rows=self._head.tile_rows, fused=self._head.fused)
        return self._copy

    def _initial_model(self) -> nn.Module:
        if self._versions() == self._initial:
            log.info("freezing a copy of the model as the reference")
            return cast(nn.Module, copy.deepcopy(self._model))
        if self._read_again is None:
            raise ValueError(
                "the reference model is first asked for after the weights have changed, and this policy "
                "was not loaded from disk: call policy.prepare(['ref_logprobs']) before training"
            )
        log.info("reading the reference model again: the weights have changed since load")
        return self._read_again()

    def _versions(self) -> tuple[int, ...]:
        """Counts in-place changes of every weight: equal to the initial ones as long as none was trained."""
        return tuple(p._version for p in cast(torch.nn.Module, self._model).parameters())
