"""The key/value cache of a decode: Hugging Face's own, with room to grow in place and a column for every token.

Letters: B rows, K key/value heads, D head size, S columns of the buffers, n new tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokenloom.policy.tree_forward import MaskKinds


def columns_for(length: int, block: int) -> int:
    """The columns S of buffers, grown by `block`, that hold `length`."""
    return -(-length // block) * block


def new_cache(config: Any) -> Cache:
    """An empty cache for a model of `config`, of the kind each layer needs (full, window, recurrent)."""
    cache = DynamicCache(config=config)
    # Exactly DynamicLayer: window and recurrent layers have bounded or other state and keep their own class.
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class Place:
    """Where the next tokens of a masked cache go, the same for all layers.

    Neighboring rows take part, from `row` on; their tokens go to `columns`: the first of neighboring ones, the same
    for all of them, or [B, n]. `length` columns will be in use then.
    """

    row: int = 0
    columns: int | Tensor = 0
    length: int = 0
    counts: Tensor | None = None
    """How many of its new tokens count, [B]; behind them stands anything."""
    alike: bool = False
    """Whether all layers are given the same mask."""
    made: Any = None
    """What the first compiled layer of a forward made of it, its mask and its angles for the others."""


def new_masked_cache(
    config: Any, place: Place, *, rows: int, dtype: torch.dtype | None, transposed: bool, block: int
) -> Cache | None:
    """An empty cache for attention that is told by a mask alone what it sees; None where masks cannot tell it all.

    All layers, those with a window too, hold every token; see `MaskedLayer` for the rest.
    """
    cache = DynamicCache(config=config)
    if MaskKinds.from_config(config).unknown:
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [MaskedLayer(place, rows, dtype=dtype, transposed=transposed, block=block) for _ in cache.layers]
    return cache


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
    """Keys and values [B K, S, D] of `rows` rows, in buffers that grow by `block` columns and are handed out whole.

    So their shape stays the same for `block` steps (kernels are chosen by shape, on a GPU at some cost), and they are
    contiguous (batched products copy what is not). `transposed` keys lie as [B K, D, S], as products read them.
    `dtype` is the format to keep them in (None: as they come). Before a step the caller sets `place`.
    """

    def __init__(self, place: Place, rows: int, *, dtype: torch.dtype | None, transposed: bool, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the parent has no annotations
        self.place, self._rows, self._heads = place, rows, 1
        self._dtype, self._transposed, self._block = dtype, transposed, block

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [B, K, n, D] of new tokens; returns keys and values [B, K, S, D] of their rows."""
        keys, values = self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return self._apart(keys), self._apart(values)

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, n, K, D] of new tokens; returns keys and values [B K, S, D] of their rows."""
        keys, values = self._room(len(key), key.shape[2], key.shape[3], value.shape[3], key)
        self._put(keys, key)
        self._put(values, value)
        return keys, values

    def room(self, rows: int, heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows K, S, D] to which a caller writes the new tokens himself."""
        return self._room(rows, heads, size, size, like)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether keys lie transposed, and all in this format."""
        return self._transposed and self._dtype == dtype

    def _room(self, rows: int, heads: int, key_size: int, value_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        self._reach(heads, key_size, value_size, like)
        assert self.keys is not None
        assert self.values is not None
        if rows == self._rows:
            return self.keys, self.values
        start = self.place.row * self._heads
        here = slice(start, start + rows * self._heads)
        return self.keys[here], self.values[here]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at `beam_idx` [n], repeats allowed."""
        self._rows = len(beam_idx)
        if self.keys is not None and self.values is not None:
            keys, values = (self._apart(x)[beam_idx].flatten(0, 1) for x in (self._stored(self.keys), self.values))
            self.keys, self.values = self._stored(keys), values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy what lies in columns `source` [B, m] of each row to columns `target` [B, m]."""
        if self.keys is None or self.values is None:
            return
        rows = torch.arange(len(source), device=source.device)[:, None]
        for buffer in (self._apart(self.keys), self._apart(self.values)):
            buffer[rows, :, target] = buffer[rows, :, source]

    def _put(self, buffer: Tensor, states: Tensor) -> None:
        b, n, heads, size = states.shape
        at = self.place.columns
        if not isinstance(at, int):
            rows = torch.arange(b, device=buffer.device)[:, None]
            self._apart(buffer)[rows, :, at] = states.to(buffer.dtype)
        elif n == 1:
            buffer[:, at] = states.reshape(b * heads, size)
        else:
            self._apart(buffer)[:, :, at : at + n] = states.transpose(1, 2)

    def _reach(self, heads: int, key_size: int, value_size: int, like: Tensor) -> None:
        """Make room. Zeros, for what no mask lets through is still multiplied, by zero."""
        length = self.place.length
        if self.keys is None or self.values is None:
            self._heads, self.is_initialized = heads, True
            rows, width = self._rows * self._heads, columns_for(length, self._block)
            lying = (rows, key_size, width) if self._transposed else (rows, width, key_size)
            self.keys = self._stored(like.new_zeros(lying, dtype=self._dtype))
            self.values = like.new_zeros(rows, width, value_size, dtype=self._dtype)
        elif length > self.values.shape[1]:
            width = columns_for(length, self._block)
            keys = _widened(self._stored(self.keys), -1 if self._transposed else -2, width)
            self.keys, self.values = self._stored(keys), _widened(self.values, -2, width)

    def _stored(self, keys: Tensor) -> Tensor:
        """From keys [B K, S, D] to how they lie, and back."""
        return keys.transpose(1, 2) if self._transposed else keys

    def _apart(self, states: Tensor) -> Tensor:
        return states.view(-1, self._heads, *states.shape[1:])


def masked_layer(cache: Any, number: int) -> MaskedLayer | None:
    """That layer of a cache, if it is masked; None for other ones, without a cache, or before it has such a layer."""
    try:
        layer = None if cache is None else cache.layers[number]
    except LookupError:  # a cache may be given its layers as they come
        return None
    return layer if isinstance(layer, MaskedLayer) else None


def _widened(states: Tensor, dim: int, capacity: int) -> Tensor:
    shape = list(states.shape)
    length, shape[dim] = shape[dim], capacity
    wide = states.new_zeros(shape)
    wide.narrow(dim, 0, length).copy_(states)
    return wide
