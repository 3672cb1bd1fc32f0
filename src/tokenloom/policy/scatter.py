"""From values at gathered tokens back to [B, T]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.policy.interface import Gathered
from tokenloom.policy.needs import Needs
from tokenloom.signals import SIGNAL_NAMES, Signals


class Scatter:
    """Collects signals part by part and lays them out as [B, T] or [B, T, K], zero elsewhere."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.tokens = rollouts.tokens
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._whole: dict[str, Tensor] = {}

    def targets(self, part: Gathered) -> Tensor:
        """Ids [N] of the tokens that `part.hidden` predicts, on its device."""
        return self.gather(self.tokens, part)

    def gather(self, values: Tensor, part: Gathered) -> Tensor:
        """The entries [N] or [N, K] of `values` [B, T] or [B, T, K] at the tokens of `part`, on its device."""
        device = values.device
        return values[part.rows.to(device), part.columns.to(device)].to(part.hidden.device)

    def put(self, name: str, part: Gathered, values: Tensor) -> None:
        """Record `values` [N] or [N, K] for the tokens of `part`."""
        self._parts.setdefault(name, []).append((part.rows, part.columns, values))

    def put_whole(self, values: Mapping[str, Tensor]) -> None:
        """Record signals that are laid out already, [B, T] or [B, T, K] by name."""
        self._whole |= values

    def signals(self, wanted: Needs, *, grad: bool) -> Signals:
        """The signals asked for. `old_*` are the current ones without gradient."""
        named: dict[str, Tensor] = {}
        for name in wanted.names:
            current = name.removeprefix("old_") if name in SIGNAL_NAMES else name
            laid = self._laid(current)
            frozen = current != name or name == "ref_logprobs" or name in self._whole
            if grad and not frozen and not laid.requires_grad:
                # No token at all, or a signal of frozen parts: a loss made of it still has a (zero) gradient.
                laid = laid.requires_grad_()
            named[name] = laid.detach() if frozen else laid
        extras = {n: v for n, v in named.items() if n not in SIGNAL_NAMES}
        return Signals(**{n: v for n, v in named.items() if n in SIGNAL_NAMES}, extras=extras)

    def _laid(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name]
        parts = self._parts.get(name, [])
        device = self.tokens.device
        if not parts:
            return torch.zeros(self.tokens.shape, device=device)
        rows, columns, values = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        empty = torch.zeros(*self.tokens.shape, *values.shape[1:], dtype=values.dtype, device=device)
        return empty.index_put((rows, columns), values)
