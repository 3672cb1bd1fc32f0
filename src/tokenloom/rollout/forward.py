"""A model with its key/value cache: prefill every distinct prompt once, then step all rows together.

Letters: U distinct prompts, B rows, P the longest prompt, n new tokens of a row, V vocabulary. Prompts are padded on
the left, so that a row's tokens lie side by side: its prompt up to column P, token t of its response in column P + t.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_positions(policy: Any) -> int | None:
    """Most tokens, prompt and response together, that the model was made for; None if it does not say."""
    config = base_model(policy.model).config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return None if found is None else int(found)


class CachedForward(Protocol):
    """First `start`, then `step` again and again."""

    def start(self, prompts: Sequence[tuple[int, ...]], rows: Tensor) -> Tensor:
        """Logits [B, V] of the first token of each row, the b-th an answer to `prompts[rows[b]]`."""
        ...

    def step(self, tokens: Tensor, done: int | Tensor) -> Tensor:
        """Logits [B, n, V] after each of `tokens` [B, n], which `done` tokens of their response precede.

        `done` is one number for all rows, or [B]: rows may advance by different numbers of tokens, and what was
        written at or behind `done` before is forgotten.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows at `rows` [n] only."""
        ...


class ModelCall:
    """Calls a model with the arguments that its architecture has; `options` are added to each call.

    What the model returned last is `output`.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self._model, self._options = model, options
        self._accepted = set(inspect.signature(base_model(model).forward).parameters)
        self.output: Any = None

    def __call__(
        self,
        tokens: Tensor | None,
        mask: Any,
        positions: Tensor,
        cache: Any,
        *,
        last: int,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, last, V] of the `last` of `tokens` [B, n], or of input `embeddings` [B, n, D] instead."""
        # transformers renamed the argument in 5.x.
        given: dict[str, Any] = {"cache" if "cache" in self._accepted else "past_key_values": cache}
        if "position_ids" in self._accepted:
            given["position_ids"] = positions
        if "logits_to_keep" in self._accepted:
            given["logits_to_keep"] = last
        inputs = {"inputs_embeds": embeddings} if tokens is None else {"input_ids": tokens}
        self.output = self._model(**inputs, attention_mask=mask, use_cache=True, **given, **self._options)
        logits: Tensor = self.output.logits
        return logits[:, -last:]


class StatefulForward:
    """With layers that carry some other state than keys and values, which no token can be taken out of again."""

    def __init__(self, policy: Any) -> None:
        self._call, self._device = ModelCall(policy.model), policy.device
        self._config = base_model(policy.model).config

    def start(self, prompts: Sequence[tuple[int, ...]], rows: Tensor) -> Tensor:
        """See `CachedForward`."""
        from tokenloom.rollout.cache import new_cache  # brings transformers, which reading a recipe need not wait for

        ids, self._pads = left_padded(prompts, self._device)
        self._width, self._padded = ids.shape[1], bool(self._pads.any())
        self._cache = new_cache(self._config)
        at = torch.arange(self._width, device=self._device) - self._pads[:, None]
        logits = self._call(ids, self._real(self._width), at.clamp(min=0), self._cache, last=1)
        self.keep(rows)
        return logits[rows, 0]

    def step(self, tokens: Tensor, done: int | Tensor) -> Tensor:
        """See `CachedForward`; all rows advance together, by one token."""
        assert isinstance(done, int)
        length = self._width + done + 1
        at = length - 1 - self._pads[:, None]
        # A mask of columns says nothing to layers that hold a state; theirs would be over the new token alone.
        return self._call(tokens, self._real(length) if self._attends() else None, at, self._cache, last=1)

    def _attends(self) -> bool:
        from transformers.cache_utils import CacheLayerMixin

        return any(isinstance(layer, CacheLayerMixin) for layer in self._cache.layers)

    def keep(self, rows: Tensor) -> None:
        """See `CachedForward`."""
        self._pads = self._pads[rows]
        self._cache.reorder_cache(rows)  # type: ignore[arg-type]  # an int64 tensor

    def _real(self, length: int) -> Tensor | None:
        """Which of so many columns hold no padding, [B, length]."""
        if not self._padded:
            return None
        return (torch.arange(length, device=self._device) >= self._pads[:, None]).long()


def left_padded(prompts: Sequence[tuple[int, ...]], device: Any) -> tuple[Tensor, Tensor]:
    """Ids [U, P] and the number of pads before each prompt [U]."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
    return ids.to(device), torch.tensor([width - len(p) for p in prompts], device=device)
