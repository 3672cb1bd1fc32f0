"""Decoder layers as one call of compiled code, for decoding on the CPU.

What it replaces is a layer as Llama, Mistral and Qwen have it: RMS norms, attention with rotary positions and shared
key/value heads, a gated MLP. In bfloat16, weights are cast and laid out once for each use; sums, norms, softmax and the
stream between layers are float32, so it rounds less often than autocast does. In float32 weights stay where they are.

Letters: B rows, n new tokens of each, N outputs and K inputs of a product, S columns of the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.rollout.cache import MaskedLayer, Place, columns_for
from tokenloom.rollout.native.build import library, serves

Norms = dict[nn.Module, tuple[Tensor, float]]
"""For each RMS norm, what it multiplies by and the term in its root."""

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
)
# Of a product of more rows the matrix units that some processors have are the faster ones.
_FEW_ROWS = 64
_PANEL, _VECTOR = 32, 16
"""Outputs that are summed together, and numbers of a vector."""


class _Weight(ctypes.Structure):
    """`Weight` of block.cpp."""

    _fields_ = [("part", ctypes.c_void_p * 3), ("rows", ctypes.c_int64 * 3), ("alternate", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    """`Layer` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "heads", "groups", "size", "inner", "activation")),
        *((name, ctypes.c_float) for name in ("first_eps", "second_eps", "query_eps", "key_eps", "scaling")),
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias")),
        *((name, _Weight) for name in ("qkv", "out", "gated", "down")),
    ]


class _Step(ctypes.Structure):
    """`Step` of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "columns", "used")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "mask", "places", "starts", "at")),
        *((name, ctypes.c_int64) for name in ("angles_by_row", "mask_by_row", "mask_by_token")),
    ]


@dataclass
class _Made:
    """What compiled layers share in one forward."""

    mask: Tensor
    angles: tuple[Tensor, Tensor]
    step: _Step
    held: Sequence[Tensor]
    """What `step` points to."""
    out: Tensor | None = None
    """What the last call gave: behind `layers` too, which need not compute it again."""
    layers: Collection[int] = ()


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


def linear(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product x [..., K] -> [..., N], float32, of a layer that `is_linear` takes; rows of zeros take no time."""
    rows, inputs = layer.weight.shape
    weight, held = _weight([layer.weight], dtype)

    def forward(x: Tensor) -> Tensor:
        flat = x.to(dtype).reshape(-1, inputs)
        out = torch.empty(len(flat), rows)
        alive = flat.any(-1)
        at = alive.nonzero()[:, 0]
        if len(at) < len(flat):
            out[~alive] = 0.0
            flat = flat[at]
        flat = flat.contiguous()
        _call("linear", dtype, _at(flat), _at(at), len(at), inputs, rows, ctypes.addressof(weight), _at(out))
        return out.view(*x.shape[:-1], rows)

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
    fits = width % _PANEL == 0 and inner % _VECTOR == 0 and size % _PANEL == 0
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

    def __init__(self, module: Any, norms: Norms, dtype: torch.dtype, otherwise: Callable[..., Any]) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._dtype, self._most, self._otherwise = dtype, most_rows(dtype), otherwise
        self._number, self._size, self._hooks = attention.layer_idx, attention.head_dim, hooks_inside(module)
        self._groups = attention.k_proj.out_features // self._size
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        none: tuple[Tensor | None, float] = (None, 0.0)
        first, second = norms[module.input_layernorm], norms[module.post_attention_layernorm]
        query = norms[attention.q_norm] if hasattr(attention, "q_norm") else none
        key = norms[attention.k_norm] if hasattr(attention, "k_norm") else none
        self._watched = [module._forward_hooks, module._forward_pre_hooks, *self._hooks]
        self._behind: Sequence[CompiledLayer] = ()
        self._heard: list[Any] = []
        self._layer = _Layer(
            attention.q_proj.in_features,
            attention.q_proj.out_features // self._size,
            self._groups,
            self._size,
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
            setattr(self._layer, name, _at(vector))
        for name, linears in {"qkv": projections, "out": [attention.o_proj], "down": [mlp.down_proj]}.items():
            self._set(name, *_weight([m.weight for m in linears], dtype))
        self._set("gated", *_weight([mlp.gate_proj.weight, mlp.up_proj.weight], dtype, alternate=True))

    def _set(self, name: str, weight: _Weight, held: Sequence[Tensor]) -> None:
        setattr(self._layer, name, weight)
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
        layer = None if held is None else held.layers[self._number]
        made = layer.place.made if isinstance(layer, MaskedLayer) else None
        if made is not None and made.out is hidden_states and self._number in made.layers:
            return hidden_states
        if (
            not isinstance(layer, MaskedLayer)
            or attention_mask is None
            or position_embeddings is None
            or not self._can(hidden_states, layer, attention_mask, position_embeddings[0])
        ):
            given = {"cache": cache} if past_key_values is None else {"past_key_values": past_key_values}
            mine = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return self._otherwise(hidden_states, **mine, **given, **others)
        b, n, _width = hidden_states.shape
        place = layer.place
        out = hidden_states.to(torch.float32, copy=True).contiguous()
        if made is None or made.mask is not attention_mask or made.angles is not position_embeddings:
            made = place.made = _made(place, b, n, attention_mask, position_embeddings, self._dtype)
            if place.counts is not None:
                # What nobody reads may be anything; zeros take no time in the head.
                out[torch.arange(n) >= place.counts[:, None]] = 0.0
        along = self._behind if place.alike and not any(self._heard) else ()
        self._compute([self, *along], held, hidden_states, out, made.step)
        made.out, made.layers = out.to(hidden_states.dtype), {one._number for one in along}
        return made.out

    def followed_by(self, others: Sequence[CompiledLayer]) -> None:
        """Compute layers along with this one, which directly follow it, where nothing tells them apart."""
        self._behind = others if all(one._size == self._size for one in others) else ()
        self._heard = [hooks for one in (self, *others) for hooks in one._watched]

    def _compute(self, layers: Sequence[CompiledLayer], cache: Any, hidden: Tensor, out: Tensor, step: _Step) -> None:
        """What `layers` make of `out` [B, n, K], in place."""
        rooms = [cache.layers[one._number].room(len(hidden), one._groups, one._size, hidden) for one in layers]
        several = ctypes.c_void_p * len(layers)
        described = several(*(ctypes.addressof(one._layer) for one in layers))
        keys, values = (several(*(x.data_ptr() for x in side)) for side in zip(*rooms, strict=True))
        at = [ctypes.addressof(x) for x in (described, step, keys, values)]
        _call("blocks", self._dtype, at[0], len(layers), at[1], _at(out), at[2], at[3])

    def _can(self, hidden: Tensor, layer: MaskedLayer, mask: Tensor, cos: Tensor) -> bool:
        fits = layer.holds(self._dtype) and mask.is_floating_point() and mask.shape[-1] % _PANEL == 0
        if not fits or any(self._hooks) or cos.shape[-1] != self._size:
            return False
        return self._most is None or hidden.shape[0] * hidden.shape[1] <= self._most


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
    step = _Step(b, n, mask.shape[-1], min(columns_for(place.length, _VECTOR), mask.shape[-1]), *map(_at, held))
    step.angles_by_row, step.mask_by_row, step.mask_by_token = len(cos) > 1, len(mask) > 1, mask.shape[2] > 1
    return _Made(mask, angles, step, held)


def _weight(
    parts: Sequence[Tensor], dtype: torch.dtype, *, alternate: bool = False
) -> tuple[_Weight, Sequence[Tensor]]:
    """Matrices [N, K] one upon the other, or 16 rows of each of two in turn; with the tensors that it points to."""
    held = [part.detach().contiguous() for part in parts]
    if dtype == torch.bfloat16:
        held = [_packed(*held) if alternate else _packed(torch.cat(held) if len(held) > 1 else held[0])]
    weight = _Weight()
    for i, part in enumerate(held):
        weight.part[i], weight.rows[i] = part.data_ptr(), len(part)
    weight.alternate = alternate
    return weight, held


def _packed(weight: Tensor, other: Tensor | None = None) -> Tensor:
    rows, inputs = weight.shape
    outputs = -(-rows * (1 if other is None else 2) // _PANEL) * _PANEL
    out = torch.empty(outputs * inputs, dtype=torch.bfloat16)
    _call("pack", None, _at(weight), _at(other), rows, inputs, _at(out))
    return out


def _biases(linears: Sequence[Any]) -> Tensor | None:
    if all(m.bias is None for m in linears):
        return None
    return torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in linears])


def _is_plain(module: Any) -> bool:
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return False
    return (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)


def _activation(function: Callable[[Tensor], Tensor]) -> int | None:
    x = torch.linspace(-8, 8, 64)
    fits = [bool((function(x) - known(x)).abs().max() < 1e-5) for known in _ACTIVATIONS]
    return fits.index(True) if True in fits else None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, dtype: torch.dtype | None, *values: int | None) -> None:
    whole = name if dtype is None else name + ("_float32" if dtype == torch.float32 else "_bfloat16")
    function = getattr(library(), whole)
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"tokenloom::{whole}"):
            function(*values, torch.get_num_threads())
    else:
        function(*values, torch.get_num_threads())
