"""A model with its key/value cache: prefill every distinct prompt once, then step all rows together.

Letters: U distinct prompts, B rows, P the longest prompt, n new tokens of a row, S columns of the cache, V vocabulary.
Prompts are padded on the left, so that a row's tokens lie side by side: its prompt up to column P, token t of its
response in column P + t. What a token sees is then an interval of columns, whatever its row has written behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.policy.tree_forward import MaskKinds
from tokenloom.rollout.attention import BLOCKED

_NOWHERE = 2**40  # a position that no token sees
_LEAST_SHARED = 64  # tokens to save before a forward of its own is worth it
_CHUNK = 1024  # tokens of a prefill at once, to bound its memory
# Up to so many rows, products in bfloat16 cost more to call than they save in reading.
_FEW_ROWS = 8


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_positions(policy: Any) -> int | None:
    """Most tokens, prompt and response together, that the model was made for; None if it does not say."""
    config = base_model(policy.model).config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return None if found is None else int(found)


def can_forget(policy: Any) -> bool:
    """Whether the model's cache can take tokens back, as rows that advance by drafts need."""
    from tokenloom.rollout.cache import new_masked_cache

    return new_masked_cache(base_model(policy.model).config) is not None


class CachedForward:
    """The model, called with the arguments that its architecture has; first `start`, then `step` again and again.

    `lean` says that all attention is in lean forms (see `lean`); `ragged` that rows may advance by different
    numbers of tokens, for which the model's cache must be able to forget.

    Where attention can be told by a mask alone what it sees, as lean and ragged attention is, tokens that all prompts
    begin with are computed once.
    """

    def __init__(self, policy: Any, *, lean: bool, ragged: bool) -> None:
        from tokenloom.rollout.cache import new_cache, new_masked_cache  # transformers: not needed to read a recipe

        base = base_model(policy.model)
        self._model, self._device, self._lean = policy.model, policy.device, lean
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._kinds, self._positions = MaskKinds.from_config(base.config), model_positions(policy)
        masked = new_masked_cache(base.config) if lean or ragged else None
        self._masked = masked is not None
        self._cache: Any = new_cache(base.config) if masked is None else masked
        self._casts = torch.is_autocast_enabled(self._device.type)
        self._dtype = torch.get_autocast_dtype(self._device.type) if self._casts else next(base.parameters()).dtype

    def start(self, prompts: Sequence[tuple[int, ...]], rows: Tensor) -> Tensor:
        """Logits [B, V] of the first token of each row, the b-th an answer to `prompts[rows[b]]`."""
        lengths = torch.tensor([len(p) for p in prompts])
        self._width, self._shared, self._reached = int(lengths.max()), 0, 0
        ids = torch.zeros(len(prompts), self._width, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, self._width - len(prompt) :] = torch.tensor(prompt)
        self._pads = (self._width - lengths).to(self._device)
        self._padded = bool(self._pads.any())
        if self._masked:
            logits = self._masked_prefill(prompts, ids, len(rows))
        else:
            at = torch.arange(self._width, device=self._device) - self._pads[:, None]
            mask = (at >= 0).long() if self._padded else None  # hides the pads' id
            logits = self._call(ids.to(self._device), mask, at.clamp(min=0), last=1)[:, -1]
        self.keep(rows)
        return logits[rows]

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows at `rows` [n] only, repeats allowed."""
        self._pads = self._pads[rows]
        self._cache.reorder_cache(rows)

    def step(self, tokens: Tensor, done: int | Tensor) -> Tensor:
        """Logits [B, n, V] after each of `tokens` [B, n], which `done` tokens of their response precede.

        `done` is one number for all rows, or [B]; then `tokens` may be cut off or rewritten by a later step.
        """
        if self._masked:
            return self._masked_step(tokens, self._width + done)
        at = self._width + done - self._pads[:, None]
        every = torch.arange(self._width + int(done) + 1, device=self._device)
        mask = (every >= self._pads[:, None]).long() if self._padded else None
        return self._call(tokens, mask, at, last=1)

    # -- told by masks ------------------------------------------------------------------------------

    def _masked_prefill(self, prompts: Sequence[tuple[int, ...]], ids: Tensor, rows: int) -> Tensor:
        """Logits [U, V] after each prompt: what all begin with once, then the rest, some prompts at a time."""
        if self._lean and self._casts and rows <= _FEW_ROWS:
            self._dtype = torch.promote_types(self._dtype, torch.float32)
        shared = _common_length(prompts)
        if shared * (len(prompts) - 1) < _LEAST_SHARED:
            shared = 0
        for layer in self._cache.layers:
            layer.count, layer.kept_dtype = 1 if shared else len(prompts), self._dtype if self._lean else None
        if shared:
            pads, padded = self._pads, self._padded
            self._pads, self._padded = torch.zeros_like(pads[:1]), False
            self._masked_step(torch.tensor([prompts[0][:shared]], device=self._device), 0, last=1)
            self._cache.reorder_cache(torch.zeros_like(pads))
            self._pads, self._padded, self._shared = pads, padded, shared
        at_once = max(1, _CHUNK // (self._width - shared))
        parts = []
        for begin in range(0, len(prompts), at_once):
            some = slice(begin, begin + at_once)
            parts.append(self._masked_step(ids[some, shared:].to(self._device), shared, some, last=1)[:, -1])
        return torch.cat(parts)

    def _masked_step(
        self, tokens: Tensor, first: int | Tensor, rows: slice = slice(None), *, last: int | None = None
    ) -> Tensor:
        """Logits of the `last` (None: all) of `tokens` [B, n], which go to columns from `first` (one, or [B]) on."""
        ahead = torch.arange(tokens.shape[1], device=self._device)
        columns = (first if isinstance(first, int) else first[:, None]) + ahead
        for layer in self._cache.layers:
            layer.rows, layer.columns = rows, first if isinstance(first, int) else columns
        pads = self._pads[rows, None]
        positions = columns - pads
        mask = self._masks(positions if self._padded or columns.ndim == 2 else columns[None], pads, columns)
        # Padding before a prompt, and behind a draft shorter than others, has no position of its own.
        most = None if self._positions is None else self._positions - 1
        return self._call(tokens, mask, positions.clamp(min=0, max=most), last=last or tokens.shape[1])

    def _masks(self, positions: Tensor, pads: Tensor, columns: Tensor) -> Any:
        """What tokens at `positions` [B or 1, n] see, [B or 1, 1, n, S]; by type of layer if there are several."""
        from tokenloom.rollout.cache import columns_for

        # As many as were ever needed: when the row that is furthest ahead leaves, the buffers stay as they are.
        self._reached = max(self._reached, columns_for(int(columns.max()) + 1))
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

    # -- the call -----------------------------------------------------------------------------------

    def _call(self, tokens: Tensor, mask: Any, positions: Tensor, *, last: int) -> Tensor:
        """Logits [B, at least `last`, V] that end with those of the `last` tokens."""
        # transformers renamed the argument in 5.x.
        given: dict[str, Any] = {"cache" if "cache" in self._accepted else "past_key_values": self._cache}
        if "position_ids" in self._accepted:
            given["position_ids"] = positions
        if "logits_to_keep" in self._accepted:
            given["logits_to_keep"] = last
        logits: Tensor = self._model(input_ids=tokens, attention_mask=mask, use_cache=True, **given).logits
        return logits


def _common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, one less than the shortest has at most."""
    most = min(len(p) for p in prompts) - 1
    first, last = min(prompts), max(prompts)  # in order of the alphabet: what these two share, all share
    return next((i for i in range(most) if first[i] != last[i]), most)
