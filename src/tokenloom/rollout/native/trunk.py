"""A whole trunk in one compiled call: embeddings, layers that all are compiled code, and the norm behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tokenloom.rollout.cache import masked_layer
from tokenloom.rollout.native.block import CompiledLayer, compute

_everybody_is_heard: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook  # torch leaves it without a type
"""Whether someone listens to all modules there are."""


class CompiledTrunk:
    """Stands in for the forward of a trunk that `fitting.is_a_stack` knows, with `norm`: scale and term in its root.

    `otherwise(...)` computes what this cannot, layer by layer: a forward without a masked cache, with more than one
    mask, one that is to return more than the last hidden states, or one that someone listens to with hooks.
    """

    def __init__(
        self,
        trunk: Any,
        layers: Sequence[CompiledLayer],
        norm: tuple[Tensor, float],
        output: type[Any],
        otherwise: Callable[..., Any],
    ) -> None:
        self._trunk, self._layers, self._norm, self._otherwise = trunk, layers, norm, otherwise
        self._output = output
        self._parts = [trunk.rotary_emb, trunk.norm, *trunk.layers]
        self._cache = "cache" if "cache" in {field.name for field in fields(output)} else "past_key_values"
        self._heard = [trunk.norm._forward_hooks, trunk.norm._forward_pre_hooks]
        self._heard += [hooks for layer in layers for hooks in layer.watched]

    def __call__(self, *args: Any, **given: Any) -> Any:
        """As the trunk's own forward."""
        found = None if args or any(self._heard) else self._together(**given)
        return self._otherwise(*args, **given) if found is None else found

    def _together(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        held = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None) or position_ids is None or held is None:
            return None
        if others.pop("return_dict", True) is False or any(x is not None and x is not False for x in others.values()):
            return None
        if not use_cache or _everybody_is_heard():
            return None
        layer, trunk = masked_layer(held, 0), self._trunk
        if layer is None or not layer.place.alike:
            return None
        # Somebody may have put other parts in, or left some out.
        if [trunk.rotary_emb, trunk.norm, *trunk.layers] != self._parts:
            return None
        if trunk.config.num_hidden_layers != len(self._layers):
            return None
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or not self._layers[0].can(given.shape[0] * given.shape[1], held, attention_mask):
            return None
        hidden = trunk.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        angles = trunk.rotary_emb(hidden, position_ids=position_ids)
        out = compute(self._layers, hidden, held, attention_mask, angles, self._norm)
        return self._output(last_hidden_state=out, **{self._cache: held})
