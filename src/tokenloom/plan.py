"""`Plan` and `Update`: what an algorithm decided about a whole batch, before any gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from tokenloom.masked import row_index

GIVEN = "given/"
"""Prefix of an update's tensors that are inputs of signals, not of parts."""


@dataclass(frozen=True, eq=False)
class Update:
    """One optimizer step's share of a plan: everything that the loss reads and the policy does not say.

    `rows` [n] int64 index the batch; every tensor of `tensors` has first dimension n; `constants` are
    the step and the like; `live` [n, T] says which tokens can have an effect, the only ones whose signals the
    loss reads. Indexing gives a micro-batch: the sum of the losses of any split equals the
    loss of the whole, because normalization was settled in the plan.
    """

    rows: Tensor
    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    live: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    whole: bool = True

    def __len__(self) -> int:
        return int(self.rows.numel())

    def __getitem__(self, index: Tensor | Sequence[int]) -> Self:
        at = row_index(index, self.rows.device)
        return replace(
            self,
            rows=self.rows[at],
            tensors={k: v[at] for k, v in self.tensors.items()},
            live=self.live[at],
            whole=False,
        )

    @property
    def live_rows(self) -> Tensor:
        """Positions within the update [m] whose gradient can be non-zero; the others may be left out of the model."""
        return self.live.any(-1).nonzero().reshape(-1)

    @property
    def given(self) -> dict[str, Tensor]:
        """Signals taken before the update that signals of the loss take as inputs, [n, T] or [n, T, K] by name."""
        return {k.removeprefix(GIVEN): v for k, v in self.tensors.items() if k.startswith(GIVEN)}


@dataclass(frozen=True, eq=False)
class Plan:
    """The decisions of an algorithm for a batch of B rows.

    `values` holds per-row and per-token quantities by vocabulary name (advantages, weights, scale,
    returns, keep, ...) for inspection; `updates` the optimizer steps in order; `state` what stateful
    parts carry to the next step; `metrics` what the stages measured.
    """

    updates: tuple[Update, ...]
    values: dict[str, Any]
    state: dict[str, Any]
    metrics: dict[str, float]


class Metrics:
    """Sums and counts that add up over micro-batches and ranks; `result()` gives the means."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` things; a name added with count 0 only is left out of the result."""
        self._sums[name] = self._sums.get(name, 0.0) + float(total)
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def merge(self, others: Iterable[Self]) -> Self:
        """Add other metrics into this one."""
        for other in others:
            for name, total in other._sums.items():
                self.add(name, total, other._counts[name])
        return self

    def result(self) -> dict[str, float]:
        """Mean of every name; names starting with `loss` are sums."""
        return {
            name: total if name.split("/")[0] == "loss" else total / self._counts[name]
            for name, total in sorted(self._sums.items())
            if self._counts[name]
        }
