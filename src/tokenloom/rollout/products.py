"""Matrix products of a decode: each weight laid out once for the processor's own kernels.

A product with few rows takes as long as its weight takes to stream in. PyTorch's linear layer hands float32 to MKL,
slow away from Intel's processors, and leaves bfloat16 weights in rows, which oneDNN rearranges at every call. Here
float32 weights go to oneDNN as they are. Weights that autocast would cast to bfloat16 (and keep) are cast and arranged
once, several of the same input side by side: no more memory than autocast takes. Nothing else is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def product(linears: Sequence[Any]) -> Product:
    """A function from x [..., in] to the outputs of layers of that input side by side, [..., sum of out].

    What is no plain linear layer, or has no better kernel, is called as it is. The function keeps the weights of now:
    drop it before they change.
    """
    if len(linears) == 1 or _cast_to(linears) is not None:
        return _joint(linears)
    parts = [_joint([linear]) for linear in linears]
    return lambda x: torch.cat([part(x) for part in parts], -1)


def products(linears: Sequence[Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The same with the outputs apart."""
    if _cast_to(linears) is not None:
        joint, sizes = _joint(linears), [linear.out_features for linear in linears]
        return lambda x: torch.split(joint(x), sizes, -1)
    parts = [_joint([linear]) for linear in linears]
    return lambda x: tuple(part(x) for part in parts)


def kernel_dtype(linears: Sequence[Any]) -> torch.dtype | None:
    """The format in which oneDNN's product serves all the layers; None when they are better called."""
    mkldnn: Any = torch.backends.mkldnn  # its functions have no annotations
    if not (mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    for linear in linears:
        if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
            return None
        if (linear.weight.device.type, linear.weight.dtype) != ("cpu", torch.float32):
            return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return dtype
    return None


def _cast_to(linears: Sequence[Any]) -> torch.dtype | None:
    """The format to which all the weights are cast, None when they are not."""
    dtype = kernel_dtype(linears)
    return None if dtype == torch.float32 else dtype


def _joint(linears: Sequence[Any]) -> Product:
    """One product for one layer, or for several whose weights are cast."""
    dtype = kernel_dtype(linears)
    if dtype is None:
        return cast(Product, linears[0])
    if dtype == torch.float32:
        weight, bias = linears[0].weight.detach(), linears[0].bias
        return lambda x: _product(x, weight, bias)
    arranged = torch.ops.mkldnn._reorder_linear_weight(_stacked([m.weight.detach() for m in linears], dtype))
    biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach() for m in linears]
    added = None if all(m.bias is None for m in linears) else _stacked(biases, dtype)
    return lambda x: _product(x.to(dtype), arranged, added)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    whole = torch.empty(sum(len(p) for p in parts), *parts[0].shape[1:], dtype=dtype)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part  # casts on the way: no float32 copy of the whole
        start += len(part)
    return whole
