"""Running registered attention signals: one row at a time through the model's own eager attention.

A layer's map [H, S, S] lives only until its layer is done; what stays are sums [S, S] and [S].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.batch import Rollouts
from tokenloom.policy.interface import Trunk
from tokenloom.signals import AttentionSignal

Band = tuple[float, float]


class _Collector:
    """Mean map [S, S] and mean entropies [S] over heads and the layers of a band, of the row in progress."""

    def __init__(self, band: Band, layers: int) -> None:
        first = min(int(band[0] * layers), layers - 1)
        self.layers = range(first, max(first + 1, round(band[1] * layers)))
        self.clear()

    def clear(self) -> None:
        self.map: Tensor | None = None
        self.entropies: Tensor | None = None
        self.count = 0

    def add(self, layer: int, weights: Tensor) -> None:
        if layer not in self.layers:
            return
        law = weights[0].float()  # [H, S, S]
        entropies = torch.special.entr(law).sum(-1).mean(0)
        self.map = law.mean(0) if self.map is None else self.map + law.mean(0)
        self.entropies = entropies if self.entropies is None else self.entropies + entropies
        self.count += 1


@torch.no_grad()
def run_attention_signals(
    signals: Sequence[AttentionSignal], model: Any, trunk: Trunk, rollouts: Rollouts, device: torch.device
) -> dict[str, Tensor]:
    """Every signal's values [B, T] or [B, T, K] on the rollouts' device, zero off the mask.

    Raises:
        ValueError: when the model does not show its attention, or a signal gives another shape.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)
    collectors = {s.band: _Collector(s.band, layers) for s in signals}
    found: dict[str, Tensor] = {}
    with _eager(model), _listening(model, list(collectors.values())):
        for row in range(len(rollouts)):
            if not bool(rollouts.mask[row].any()):
                continue
            tokens = torch.cat([rollouts.prompt_tokens[row].to(device), rollouts.response(row).to(device)])
            for collector in collectors.values():
                collector.clear()
            trunk(tokens[None])
            for signal in signals:
                values = _values(signal, collectors[signal.band], rollouts, row, type(model).__name__)
                whole = found.setdefault(
                    signal.name, torch.zeros(*rollouts.mask.shape, *values.shape[1:], device=rollouts.mask.device)
                )
                inside = rollouts.mask[row, : len(values)]
                whole[row, : len(values)][inside] = values.to(whole)[inside]
    for signal in signals:
        if signal.name not in found:
            shape = (*rollouts.mask.shape, *_entry(signal, device))
            found[signal.name] = torch.zeros(shape, device=rollouts.mask.device)
    return found


def _entry(signal: AttentionSignal, device: torch.device) -> torch.Size:
    """The shape behind T of a signal that has spoken of no row."""
    none = torch.zeros(0, dtype=torch.bool, device=device)
    given: dict[str, Any] = {
        "attention": torch.ones(1, 1, device=device),
        "attention_entropies": torch.zeros(1, device=device),
        "mask": none,
        "answer_mask": none,
        "prompt_length": 1,
    }
    return signal.function(*(given[n] for n in signal.inputs)).shape[1:]


def _values(signal: AttentionSignal, collector: _Collector, rollouts: Rollouts, row: int, name: str) -> Tensor:
    if collector.map is None or collector.entropies is None:
        raise ValueError(f"{name} does not give its attention weights, which {signal.name!r} reads: use another model")
    length = int(rollouts.lengths[row])
    device = collector.map.device
    answer = rollouts.extras.get("answer_mask", torch.zeros_like(rollouts.mask))
    given: dict[str, Any] = {
        "attention": collector.map / collector.count,
        "attention_entropies": collector.entropies / collector.count,
        "mask": rollouts.mask[row, :length].to(device),
        "answer_mask": answer[row, :length].to(device),
        "prompt_length": len(rollouts.prompt_tokens[row]),
    }
    values = signal.function(*(given[n] for n in signal.inputs))
    if values.shape[0] != length or values.ndim > 2:
        raise ValueError(
            f"attention signal {signal.name!r} returned shape {tuple(values.shape)} for {length} tokens; "
            "it must return [T] or [T, K]"
        )
    return values


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Only eager attention has weights to show."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _listening(model: nn.Module, collectors: list[_Collector]) -> Iterator[None]:
    """Hand every layer's weights [1, H, S, S] to the collectors."""

    def hook(module: Any, _: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4:
            for collector in collectors:
                collector.add(int(module.layer_idx), weights)

    attending = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    handles = [m.register_forward_hook(hook) for m in attending]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
