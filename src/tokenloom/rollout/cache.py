"""The key/value cache of a decode: Hugging Face's own, with room to grow in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def new_cache(config: Any) -> Cache:
    """An empty cache for a model of `config`, of the kind each layer needs (full, window, recurrent)."""
    cache = DynamicCache(config=config)
    # Exactly DynamicLayer: window and recurrent layers have bounded or other state and keep their own class.
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the parent's hook has no annotations
    """Keys and values [B, heads, S, head size] as views of buffers a quarter longer than needed.

    The parent concatenates, which copies the whole cache at every token; here a token costs its own
    copy and, now and then, a new buffer. Only for use without gradients: it writes in place.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the parent has no annotations
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; returns all keys and values so far."""
        if self.keys is None or self.values is None:
            # The prefill: its rows are expanded to the group before anything is appended.
            self.keys, self.values = key_states, value_states
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            return self.keys, self.values
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            capacity = end + max(32, end // 4)
            self._buffers = (_widened(self.keys, capacity), _widened(self.values, capacity))
        keys, values = self._buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at `beam_idx` [n], repeats allowed."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (
                self.keys.index_select(0, beam_idx),
                self.values.index_select(0, beam_idx),
            )
            self._buffers = None


def _widened(states: Tensor, capacity: int) -> Tensor:
    b, heads, length, size = states.shape
    wide = torch.empty(b, heads, capacity, size, dtype=states.dtype, device=states.device)
    wide[:, :, :length] = states
    return wide
