"""Whether compiled layers may stand for a model's own, by what these gave in a short forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenloom.rollout.attention import BLOCKED
from tokenloom.rollout.cache import MaskedLayer, Place
from tokenloom.rollout.native.block import CompiledLayer, Norms

_COLUMNS = 32
# Of the largest change that the layer makes: roundings stay far below, another function does not.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}


def reproduces(module: Any, norms: Norms, dtype: torch.dtype, call: tuple[Any, Any, Any]) -> bool:
    """`call` is (args, keyword arguments, output) of the layer over B rows of n tokens in float32, without a cache."""
    args, given, output = call
    hidden = args[0] if args else given["hidden_states"]
    theirs = output[0] if isinstance(output, tuple) else output
    b, n, _width = hidden.shape
    if not isinstance(theirs, Tensor) or given.get("position_embeddings") is None:
        return False
    place = Place(columns=0, length=n)
    layer = MaskedLayer(place, b, dtype=dtype, transposed=True, block=_COLUMNS)
    form = CompiledLayer(module, norms, dtype, _refuses)
    cache = SimpleNamespace(layers={module.self_attn.layer_idx: layer})
    try:
        ours = form(
            hidden,
            attention_mask=_additive(given.get("attention_mask"), b, n),
            position_embeddings=given["position_embeddings"],
            past_key_values=cache,
        )
    except NotImplementedError:
        return False
    return bool((ours - theirs).abs().max() <= _TOLERANCE[dtype] * (theirs - hidden).abs().max())


def follow_each_other(modules: Sequence[Any], calls: Mapping[Any, tuple[Any, Any, Any]]) -> bool:
    """Whether each layer was given exactly what the one before it gave; `calls` as in `reproduces`."""
    given = [call[0][0] if call[0] else call[1]["hidden_states"] for call in map(calls.__getitem__, modules)]
    gave = [call[2][0] if isinstance(call[2], tuple) else call[2] for call in map(calls.__getitem__, modules)]
    return all(torch.equal(*pair) for pair in zip(gave[:-1], given[1:], strict=True))


def _additive(mask: Tensor | None, b: int, n: int) -> Tensor:
    """What each token sees, as a term of the scores [b, 1, n, columns]."""
    if mask is None:
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, BLOCKED)
    wide = torch.full((b, 1, n, _COLUMNS), BLOCKED)
    wide[..., :n] = mask
    return wide


def _refuses(*_: Any, **__: Any) -> Any:
    raise NotImplementedError
