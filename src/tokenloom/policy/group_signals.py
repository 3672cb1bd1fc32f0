"""Running registered group signals: functions of all responses to one prompt together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.policy.interface import Gathered
from tokenloom.signals import GroupSignal


def hidden_by_token(parts: Iterable[Gathered], rollouts: Rollouts) -> Tensor:
    """[B, T, D] float32 states that predict each sampled token, zero elsewhere: the one signal that is this wide."""
    out: Tensor | None = None
    for part in parts:
        states = part.states.float()
        if out is None:
            out = torch.zeros(*rollouts.mask.shape, states.shape[-1], device=states.device)
        out[part.rows, part.columns] = states
    return torch.zeros(*rollouts.mask.shape, 1) if out is None else out


def run_group_signals(
    signals: Sequence[GroupSignal], rollouts: Rollouts, hidden: Tensor, logits: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Every signal's values [B, T] or [B, T, K] on the rollouts' device. `logits` turns states [n, D] into [n, V].

    Raises:
        ValueError: when a signal needs rewards that are not there, or gives another shape.
    """
    device = rollouts.mask.device
    found: dict[str, Tensor] = {}
    for group in torch.unique(rollouts.group_ids).tolist():
        rows = (rollouts.group_ids == group).nonzero().reshape(-1)
        own = rollouts.rows(rows)
        values: dict[str, Any] = {
            "hidden": hidden[rows.to(hidden.device)],
            "logits": logits,
            "tokens": own.tokens.to(hidden.device),
            "mask": own.mask.to(hidden.device),
            "outcomes": None if own.rewards is None else own.rewards.to(hidden.device),
        }
        for signal in signals:
            if "outcomes" in signal.inputs and values["outcomes"] is None:
                raise ValueError(f"signal {signal.name!r} reads the rewards of the responses; score them first")
            result = signal.function(*(values[name] for name in signal.inputs)).to(device)
            if result.shape[:2] != own.mask.shape or result.ndim > 3:
                raise ValueError(
                    f"group signal {signal.name!r} returned shape {tuple(result.shape)} for {tuple(own.mask.shape)} "
                    "tokens; it must return [R, T] or [R, T, K]"
                )
            whole = found.setdefault(
                signal.name, torch.zeros(*rollouts.mask.shape, *result.shape[2:], dtype=result.dtype, device=device)
            )
            inside = own.mask if result.ndim == 2 else own.mask[..., None]
            whole[rows] = torch.where(inside, result, torch.zeros_like(result))
    return found
