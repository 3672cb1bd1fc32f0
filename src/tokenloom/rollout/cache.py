"""The key/value cache of a decode: Hugging Face's own, with room to grow in place and a column for every token.

Letters: B rows, K key/value heads, D head size, S columns of the buffers, n new tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_BLOCK = 16


def new_cache(config: Any) -> Cache:
    """An empty cache for a model of `config`, of the kind each layer needs (full, window, recurrent)."""
    cache = DynamicCache(config=config)
    # Exactly DynamicLayer: window and recurrent layers have bounded or other state and keep their own class.
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def new_masked_cache(config: Any) -> Cache | None:
    """An empty cache for attention that is told by a mask alone what it sees; None where masks cannot tell it all.

    All layers, those with a window too, hold every token and hand out whole buffers of `columns_for(length)`
    columns, written or not.
    """
    cache = DynamicCache(config=config)
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [MaskedLayer() for _ in cache.layers]
    return cache


def columns_for(length: int) -> int:
    """The columns S of whole buffers of which `length` are in use."""
    return -(-length // _BLOCK) * _BLOCK


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the parent's hook has no annotations
    """Keys and values [B, K, S, D] as views of buffers a quarter longer than needed.

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
            self._buffers = (_widened(self.keys, -2, capacity), _widened(self.values, -2, capacity))
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


class MaskedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the parent's hook has no annotations
    """Keys [B K, D, S], transposed, and values [B K, S, D]: as the products of attention read them.

    The buffers are handed out whole, since batched products copy what is not contiguous. Before a step the caller
    says which `rows` take part, a slice, and in which `columns` their tokens go: the first of neighboring ones, the
    same for all rows, or [B, n]. Before the first it says how many rows there will be (`count`), and in which format
    to keep them (None: as they come).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the parent has no annotations
        self.rows = slice(None)
        self.columns: int | Tensor = 0
        self.count = 1
        self.kept_dtype: torch.dtype | None = None
        self._heads = 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [B, K, n, D] of new tokens; returns keys and values [B, K, S, D] of their rows."""
        keys, values = self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return self._apart(keys).transpose(-1, -2), self._apart(values)

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, n, K, D] of new tokens; returns keys [B K, D, S] and values [B K, S, D]."""
        b, n, heads, _ = key.shape
        at = self.columns
        self._reach(columns_for(at + n if isinstance(at, int) else int(at.max()) + 1), key, value)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        if b * heads != len(keys):
            some = slice((self.rows.start or 0) * heads, ((self.rows.start or 0) + b) * heads)
            keys, values = keys[some], values[some]
        if isinstance(at, int) and n == 1:
            keys[:, :, at] = key.reshape(b * heads, -1)
            values[:, at] = value.reshape(b * heads, -1)
        elif isinstance(at, int):
            self._apart(keys)[..., at : at + n] = key.permute(0, 2, 3, 1)
            self._apart(values)[:, :, at : at + n] = value.transpose(1, 2)
        else:
            rows = torch.arange(b, device=keys.device)[:, None]
            self._apart(keys)[rows, :, :, at] = key.to(keys.dtype)
            self._apart(values)[rows, :, at] = value.to(values.dtype)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at `beam_idx` [n], repeats allowed."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (self._apart(x)[beam_idx].flatten(0, 1) for x in (self.keys, self.values))

    def _apart(self, states: Tensor) -> Tensor:
        return states.view(-1, self._heads, *states.shape[1:])

    def _reach(self, width: int, key: Tensor, value: Tensor) -> None:
        """Make the buffers `width` columns wide. Zeros, for what no mask lets through is still multiplied by zero."""
        if self.keys is None or self.values is None:
            self._heads, self.is_initialized = key.shape[2], True
            rows = self.count * self._heads
            self.keys = key.new_zeros(rows, key.shape[-1], width, dtype=self.kept_dtype)
            self.values = value.new_zeros(rows, width, value.shape[-1], dtype=self.kept_dtype)
        elif width > self.keys.shape[-1]:
            self.keys, self.values = _widened(self.keys, -1, width), _widened(self.values, -2, width)


def _widened(states: Tensor, dim: int, capacity: int) -> Tensor:
    shape = list(states.shape)
    length, shape[dim] = shape[dim], capacity
    wide = states.new_zeros(shape)
    wide.narrow(dim, 0, length).copy_(states)
    return wide
