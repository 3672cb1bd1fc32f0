"""What a decode does besides forwards, as compiled code; each function says when it leaves the work to PyTorch.

Letters: N rows of scores, V scores of a row; B rows of a batch, m tokens of each that move.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.rollout.native.build import library, serves
from tokenloom.rollout.native.calls import address, call


def largest_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Values and indices [N, count] of the largest of `scores` [N, V], in order, of equal ones the first.

    What is not a number counts as larger than all that are, as it does in PyTorch.

    None for scores that are not float32 on the CPU, fewer than `count`, or without compiled code.
    """
    if scores.dtype != torch.float32 or scores.device.type != "cpu" or library() is None:
        return None
    n, v = scores.shape
    if not 0 < count <= v:
        return None
    scores = scores.contiguous()
    values, places = scores.new_empty(n, count), torch.empty(n, count, dtype=torch.int64)
    call("largest_scores", None, address(scores), n, v, count, address(values), address(places))
    return values, places


def move(layers: Sequence[Any], source: Tensor, target: Tensor) -> bool:
    """Copy what lies in columns `source` [B, m] of each row to `target` [B, m], one after another, in all layers.

    False, with nothing done, for layers that hold something else than transposed keys of one shape in a format that
    there is compiled code for.
    """
    first = layers[0].keys
    if any(layer.keys is None for layer in layers) or first.device.type != "cpu" or not serves(first.dtype):
        return False
    shape, dtype = first.shape, first.dtype
    if not all(layer.holds(dtype) and layer.keys.shape == layer.values.shape == shape for layer in layers):
        return False
    pairs, columns, size = shape
    source, target = source.contiguous(), target.contiguous()
    several = ctypes.c_void_p * len(layers)
    keys, values = several(*(x.keys.data_ptr() for x in layers)), several(*(x.values.data_ptr() for x in layers))
    here, there, m = address(source), address(target), source.shape[1]
    at = ctypes.addressof(keys), ctypes.addressof(values)
    call("move", dtype, *at, len(layers), pairs, pairs // len(source), size, columns, here, there, m)
    return True
