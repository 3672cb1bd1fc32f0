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
    theirs = _first(output)
    b, n, _width = hidden.shape
    if given.get("position_embeddings") is None:
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


def is_a_stack(trunk: Any, layers: Sequence[Any], calls: Mapping[Any, tuple[Any, Any, Any]]) -> bool:
    """Whether a trunk was embeddings, these layers in turn and a norm, and nothing else; `calls` as in `reproduces`."""
    names = {"embed_tokens", "layers", "norm", "rotary_emb"}
    if set(trunk._modules) != names or list(trunk.layers) != list(layers) or not layers:
        return False
    passed = [trunk.embed_tokens, *layers, trunk.norm, trunk]
    if any(module not in calls for module in passed) or not hasattr(calls[trunk][2], "last_hidden_state"):
        return False
    ids, positions = calls[trunk][1].get("input_ids"), calls[layers[0]][1].get("position_ids")
    given = [calls[module][0][0] if calls[module][0] else calls[module][1]["hidden_states"] for module in passed[1:-1]]
    gave = [_first(calls[module][2]) for module in passed]
    try:
        angles = trunk.rotary_emb(gave[0], position_ids=positions)
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False  # it takes other arguments
    used = [calls[layer][1].get("position_embeddings") for layer in layers]
    return (
        torch.equal(trunk.embed_tokens(ids), gave[0])
        and all(torch.equal(*pair) for pair in zip(gave[:-2], given, strict=True))
        and torch.equal(gave[-2], gave[-1])
        and all(pair is not None and all(map(torch.equal, pair, angles)) for pair in used)
    )


def _first(output: Any) -> Tensor:
    """The hidden states of what a module returned."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


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
