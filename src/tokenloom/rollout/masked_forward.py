"""The cached forward of models whose attention can be told by a mask alone what it sees.

A row's cache may then hold anything behind its last token, such as a draft that did not come true, and rows may
advance by different numbers of tokens. What all prompts begin with is computed once, and masks are built here: where
prompts share a beginning of L tokens, columns are [beginning | padding | rest of the prompt | response].

Letters: U distinct prompts, B rows, P the longest prompt, n new tokens of a row, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tokenloom.policy.tree_forward import MaskKinds
from tokenloom.rollout.attention import BLOCKED
from tokenloom.rollout.cache_block import block_of
from tokenloom.rollout.forward import ModelCall, base_model, left_padded, model_positions
from tokenloom.rollout.lean import Lean

_NOWHERE = 2**40  # a position that no token sees
_LEAST_SHARED = 64  # tokens to save before a forward of its own is worth it
_CHUNK = 1024  # tokens of a prefill at once, to bound its memory
# Up to so many rows, products in bfloat16 cost more to call than they save in reading.
_FEW_ROWS = 8


def can_be_masked(policy: Any) -> bool:
    """Whether this forward is for the policy's model: not where the self-test found that masks do not tell it all."""
    from tokenloom.rollout.cache import Place, new_masked_cache

    config = base_model(policy.model).config
    if not getattr(policy, "masks_tell", True):
        return False
    return new_masked_cache(config, Place(), rows=1, dtype=None, transposed=False, block=1) is not None


class MaskedForward:
    """See `forward.CachedForward`; `lean` says what of the model is in lean forms."""

    def __init__(self, policy: Any, *, lean: Lean) -> None:
        from tokenloom.rollout.cache import Place

        self._call, self._device, self._lean = ModelCall(policy.model), policy.device, lean
        self._config, self._positions = base_model(policy.model).config, model_positions(policy)
        self._kinds = MaskKinds.from_config(self._config)
        self._place = Place(alike=not self._kinds.names)
        self._block = block_of(self._device, lean)
        self._casts = torch.is_autocast_enabled(self._device.type)
        weights = next(base_model(policy.model).parameters()).dtype
        self._dtype = torch.get_autocast_dtype(self._device.type) if self._casts else weights

    def start(self, prompts: Sequence[tuple[int, ...]], rows: Tensor) -> Tensor:
        """See `CachedForward`."""
        from tokenloom.rollout.cache import new_masked_cache

        if self._lean.attention and not self._lean.compiled and self._casts and len(rows) <= _FEW_ROWS:
            self._dtype = torch.float32
        ids, pads = left_padded(prompts, self._device)
        self._width, self._reached = ids.shape[1], 0
        shared = _common_length(prompts)
        self._shared = shared if shared * (len(prompts) - 1) >= _LEAST_SHARED else 0
        self._cache = cast(
            Any,
            new_masked_cache(
                self._config,
                self._place,
                rows=1 if self._shared else len(prompts),
                dtype=self._dtype if self._lean.attention else None,
                transposed=self._lean.attention,
                block=self._block,
            ),
        )
        if self._shared:
            self._pads, self._padded = torch.zeros_like(pads[:1]), False
            longest = int(pads.argmin())  # it begins in the first column
            self._forward(ids[longest : longest + 1, : self._shared], 0, last=1)
            self._cache.reorder_cache(torch.zeros_like(pads))
        self._pads, self._padded = pads, bool(pads.any())
        at_once = max(1, _CHUNK // (self._width - self._shared))
        parts = []
        for begin in range(0, len(prompts), at_once):
            some = ids[begin : begin + at_once, self._shared :]
            parts.append(self._forward(some, self._shared, begin, last=1)[:, 0])
        self.keep(rows)
        return torch.cat(parts)[rows]

    def step(self, tokens: Tensor, done: int | Tensor) -> Tensor:
        """See `CachedForward`."""
        return self._forward(tokens, self._width + done, last=tokens.shape[1])

    def keep(self, rows: Tensor) -> None:
        """See `CachedForward`."""
        self._pads = self._pads[rows]
        self._cache.reorder_cache(rows)

    def _forward(self, tokens: Tensor, first: int | Tensor, row: int = 0, *, last: int) -> Tensor:
        """Logits of the `last` of `tokens` [B, n] of the rows from `row` on, which go to columns from `first` on."""
        from tokenloom.rollout.cache import columns_for

        n = tokens.shape[1]
        ahead = torch.arange(n, device=self._device)
        together = isinstance(first, int)
        columns = first + ahead if isinstance(first, int) else first[:, None] + ahead
        self._place.row, self._place.columns = row, first if together else columns
        self._place.length = n + (first if isinstance(first, int) else int(first.max()))
        # As many as were ever needed: when the row that is furthest ahead leaves, the buffers stay as they are.
        self._reached = max(self._reached, columns_for(self._place.length, self._block))
        pads = self._pads[row : row + len(tokens), None]
        positions = columns - pads
        mask = self._masks(columns[None] if together and not self._padded else positions, pads)
        # Padding before a prompt, and behind a draft shorter than others, has no position of its own.
        most = None if self._positions is None else self._positions - 1
        return self._call(tokens, mask, positions.clamp(min=0, max=most), self._cache, last=last)

    def _masks(self, positions: Tensor, pads: Tensor) -> Any:
        """What tokens at `positions` [B or 1, n] see, [B or 1, 1, n, S]; by type of layer if there are several."""
        keys = torch.arange(self._reached, device=self._device)[None]
        if self._padded:
            own = torch.where(keys - pads < self._shared, _NOWHERE, keys - pads)
            keys = torch.where(keys < self._shared, keys, own)
        distance = positions[:, None, :, None] - keys[:, None, None, :]
        seen = distance >= 0
        near = seen if self._kinds.window is None else seen & (distance < self._kinds.window)
        if not self._kinds.names:
            return self._additive(near)
        return {name: self._additive(near if name == "sliding_attention" else seen) for name in self._kinds.names}

    def _additive(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, BLOCKED)


def _common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, one less than the shortest has at most."""
    most = min(len(p) for p in prompts) - 1
    first, last = min(prompts), max(prompts)  # in order of the alphabet: what these two share, all share
    return next((i for i in range(most) if first[i] != last[i]), most)
