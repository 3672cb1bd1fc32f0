"""Decoder layers as one call of compiled code, for decoding on the CPU.

What it replaces is a layer as Llama, Mistral and Qwen have it: RMS norms, attention with rotary positions and shared
key/value heads, a gated MLP. In bfloat16, weights are cast and laid out once for each use; sums, norms, softmax and the
stream between layers are float32, so it rounds less often than autocast does. In float32 weights stay where they are.

Letters: B rows, n new tokens of each, N outputs and K inputs of a product, S columns of the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.rollout.cache import Place, columns_for, masked_layer
from tokenloom.rollout.native.build import serves
from tokenloom.rollout.native.calls import address, call
from tokenloom.rollout.native.weights import PANEL, Space, Weight, weight_of

Norms = dict[nn.Module, tuple[Tensor, float]]
"""For each RMS norm, what it multiplies by and the term in its root."""

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
)
# Of a product of more rows the matrix units that some processors have are the faster ones.
_FEW_ROWS = 64
_VECTOR = 16


class _Layer(ctypes.Structure):
    """`Layer` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "heads", "groups", "size", "inner", "activation")),
        *((name, ctypes.c_float) for name in ("first_eps", "second_eps", "query_eps", "key_eps", "scaling")),
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias")),
        *((name, Weight) for name in ("qkv", "out", "gated", "down")),
    ]


class _Step(ctypes.Structure):
    """`Step` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "columns", "used")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "mask", "places", "starts", "at")),
        *((name, ctypes.c_int64) for name in ("angles_by_row", "mask_by_row", "mask_by_token")),
        ("last_norm", ctypes.c_void_p),
        ("last_eps", ctypes.c_float),
    ]


@dataclass
class _Made:
    """What compiled layers share in one forward."""

    mask: Tensor
    angles: tuple[Tensor, Tensor]
    step: _Step
    held: Sequence[Tensor]
    """What `step` points to."""


def format_here() -> torch.dtype | None:
    """The format in which layers can be compiled code under the present autocast; None where they cannot."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return dtype if serves(dtype) else None


def most_rows(dtype: torch.dtype) -> int | None:
    """Rows of a product above which it is better left to PyTorch, None for no bound."""
    units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return _FEW_ROWS if dtype == torch.bfloat16 and units() else None


def is_linear(module: Any) -> bool:
    """Whether `linear` takes the layer."""
    plain = _is_plain(module) and module.bias is None
    return plain and module.in_features % _VECTOR == 0


def linear(layer: nn.Linear, dtype: torch.dtype, space: Space | None = None) -> Callable[[Tensor], Tensor]:
    """The product x [..., K] -> [..., N], float32, of a layer that `is_linear` takes; rows of zeros take no time."""
    rows, inputs = layer.weight.shape
    weight, held = weight_of([layer.weight], dtype, space or Space())

    def forward(x: Tensor) -> Tensor:
        flat = x.to(dtype).reshape(-1, inputs).contiguous()
        out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32)
        call("linear", dtype, address(flat), len(flat), inputs, rows, ctypes.addressof(weight), address(out))
        return out

    forward.held = held  # type: ignore[attr-defined]  # a function lets no type checker know of its attributes
    return forward


def describes(module: Any) -> bool:
    """Whether a decoder layer has only such parts and sizes as the compiled one."""
    attention, mlp = module.self_attn, module.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(map(_is_plain, linears)) or any(m.bias is not None for m in linears[4:]):
        return False
    width, inner, size = linears[0].in_features, mlp.gate_proj.out_features, attention.head_dim
    fits = width % PANEL == 0 and inner % _VECTOR == 0 and size % PANEL == 0
    return fits and _activation(mlp.act_fn) is not None


def hooks_inside(module: nn.Module) -> list[Any]:
    """The collections of hooks of all modules in a layer, which a compiled layer would not call."""
    inside = [m for m in module.modules() if m is not module]
    return [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]


class CompiledLayer:
    """Stands in for the forward of a decoder layer that `describes` knows.

    `otherwise(...)` computes what this cannot: a forward without a masked cache, or one that someone listens to with
    hooks inside the layer.
    """

    def __init__(
        self,
        module: Any,
        norms: Norms,
        dtype: torch.dtype,
        otherwise: Callable[..., Any],
        space: Space | None = None,
    ) -> None:
        space = space or Space()
        attention, mlp = module.self_attn, module.mlp
        self.dtype, self._most, self._otherwise = dtype, most_rows(dtype), otherwise
        self.number, self.size, self._hooks = attention.layer_idx, attention.head_dim, hooks_inside(module)
        self._groups = attention.k_proj.out_features // self.size
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        none: tuple[Tensor | None, float] = (None, 0.0)
        first, second = norms[module.input_layernorm], norms[module.post_attention_layernorm]
        query = norms[attention.q_norm] if hasattr(attention, "q_norm") else none
        key = norms[attention.k_norm] if hasattr(attention, "k_norm") else none
        self.watched = [module._forward_hooks, module._forward_pre_hooks, *self._hooks]
        """The collections of hooks that someone may use to hear of what goes on in the layer."""
        self.described = _Layer(
            attention.q_proj.in_features,
            attention.q_proj.out_features // self.size,
            self._groups,
            self.size,
            mlp.gate_proj.out_features,
            _activation(mlp.act_fn),
            *(eps for _, eps in (first, second, query, key)),
            attention.scaling,
        )
        vectors = {
            "first_norm": first[0],
            "second_norm": second[0],
            "query_norm": query[0],
            "key_norm": key[0],
            "qkv_bias": _biases(projections),
            "out_bias": _biases([attention.o_proj]),
        }
        self._held: list[Any] = [vectors]
        for name, vector in vectors.items():
            setattr(self.described, name, address(vector))
        for name, linears in {"qkv": projections, "out": [attention.o_proj], "down": [mlp.down_proj]}.items():
            self._set(name, *weight_of([m.weight for m in linears], dtype, space))
        self._set("gated", *weight_of([mlp.gate_proj.weight, mlp.up_proj.weight], dtype, space, alternate=True))

    def _set(self, name: str, weight: Weight, held: Sequence[Tensor]) -> None:
        setattr(self.described, name, weight)
        self._held.append(held)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        """As the layer's own forward."""
        held = past_key_values if cache is None else cache
        count = hidden_states.shape[0] * hidden_states.shape[1]
        if any(self._hooks) or not self.can(count, held, attention_mask) or not self._turns(position_embeddings):
            given = {"cache": cache} if past_key_values is None else {"past_key_values": past_key_values}
            mine = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return self._otherwise(hidden_states, **mine, **given, **others)
        assert attention_mask is not None
        assert position_embeddings is not None
        return compute([self], hidden_states, held, attention_mask, position_embeddings)

    def can(self, count: int, cache: Any, mask: Any) -> bool:
        """Whether it serves so many new tokens of all rows, with such a cache and mask."""
        layer = masked_layer(cache, self.number)
        if layer is None or not layer.holds(self.dtype) or not isinstance(mask, Tensor):
            return False
        if not mask.is_floating_point() or mask.shape[-1] % PANEL:
            return False
        return self._most is None or count <= self._most

    def _turns(self, angles: tuple[Tensor, Tensor] | None) -> bool:
        return angles is not None and angles[0].shape[-1] == self.size

    def room(self, rows: int, cache: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of its own in `cache`, with columns for the new tokens."""
        held: tuple[Tensor, Tensor] = cache.layers[self.number].room(rows, self._groups, self.size, like)
        return held


def compute(
    layers: Sequence[CompiledLayer],
    hidden: Tensor,
    cache: Any,
    mask: Tensor,
    angles: tuple[Tensor, Tensor],
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """What layers in turn, and an RMS norm behind them, make of hidden states [B, n, K]; all must be able to."""
    b, n, _width = hidden.shape
    first = layers[0]
    place = cache.layers[first.number].place
    out = hidden.to(torch.float32, copy=True).contiguous()
    made = place.made
    if made is None or made.mask is not mask or made.angles is not angles:
        made = place.made = _made(place, b, n, mask, angles, first.dtype)
        if place.counts is not None:
            # What nobody reads may be anything; zeros take no time in the head.
            out[torch.arange(n) >= place.counts[:, None]] = 0.0
    made.step.last_norm, made.step.last_eps = (None, 0.0) if norm is None else (address(norm[0]), norm[1])
    several = ctypes.c_void_p * len(layers)
    described = several(*(ctypes.addressof(one.described) for one in layers))
    rooms = [one.room(b, cache, hidden) for one in layers]
    if any(values.shape[1] != mask.shape[-1] for _, values in rooms):
        raise RuntimeError(f"a mask over {mask.shape[-1]} columns for a cache of {rooms[0][1].shape[1]}")
    keys, values = (several(*(x.data_ptr() for x in side)) for side in zip(*rooms, strict=True))
    at = [ctypes.addressof(x) for x in (described, made.step, keys, values)]
    call("blocks", first.dtype, at[0], len(layers), at[1], address(out), at[2], at[3])
    return out.to(hidden.dtype)


def _made(place: Place, b: int, n: int, mask: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> _Made:
    """What is the same for all layers of a forward."""
    columns = place.columns
    places = torch.arange(columns, columns + n).repeat(b, 1) if isinstance(columns, int) else columns.contiguous()
    cos, sin = (x.to(torch.float32).contiguous() for x in angles)
    added = mask.to(dtype).contiguous()
    counts = torch.full((b,), n) if place.counts is None else place.counts
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    at = (torch.arange(n) < counts[:, None]).flatten().nonzero()[:, 0]
    held = (cos, sin, added, places, starts, at)
    step = _Step(b, n, mask.shape[-1], min(columns_for(place.length, _VECTOR), mask.shape[-1]), *map(address, held))
    step.angles_by_row, step.mask_by_row, step.mask_by_token = len(cos) > 1, len(mask) > 1, mask.shape[2] > 1
    return _Made(mask, angles, step, held)


def _biases(linears: Sequence[Any]) -> Tensor | None:
    if all(m.bias is None for m in linears):
        return None
    none = [torch.zeros(m.out_features, dtype=torch.float32) for m in linears]
    return torch.cat(
        [zeros if m.bias is None else m.bias.detach().float() for m, zeros in zip(linears, none, strict=True)]
    )


def _is_plain(module: Any) -> bool:
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return False
    return (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)


def _activation(function: Callable[[Tensor], Tensor]) -> int | None:
    x = torch.linspace(-8, 8, 64)
    fits = [bool((function(x) - known(x)).abs().max() < 1e-5) for known in _ACTIVATIONS]
    return fits.index(True) if True in fits else None
