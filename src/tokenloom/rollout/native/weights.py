"""How compiled code finds the weights of products: as they lie in float32, cast and laid out anew in bfloat16.

Letters: N outputs and K inputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.rollout.native.calls import address, call

PANEL = 32
"""Outputs that are summed together."""
_CHUNK = 32 << 20
_LARGE = 2 << 20  # bytes of a large page


class Weight(ctypes.Structure):
    """`Weight` of block.cpp."""

    _fields_ = [("part", ctypes.c_void_p * 3), ("rows", ctypes.c_int64 * 3), ("alternate", ctypes.c_int64)]


class Space:
    """Room for bfloat16 numbers: piece by piece, or `in_chunks` of large pages.

    Chunks are for fresh memory, whose small pages it takes thrice as long to write to first. Where a process keeps what
    it frees, as training does, pieces fit into holes that chunks do not.
    """

    def __init__(self, *, in_chunks: bool = False) -> None:
        self._in_chunks, self._left = in_chunks, torch.empty(0, dtype=torch.bfloat16)

    def take(self, count: int) -> Tensor:
        """`count` numbers, a multiple of 32, of any value."""
        if not self._in_chunks:
            return torch.empty(count, dtype=torch.bfloat16)
        if count > len(self._left):
            self._left = torch.empty(max(count, _CHUNK) + _LARGE // 2, dtype=torch.bfloat16)
            begin = -self._left.data_ptr() % _LARGE // 2
            self._left = self._left[begin:]
            call("large_pages", None, address(self._left), 2 * len(self._left))
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def weight_of(
    parts: Sequence[Tensor], dtype: torch.dtype, space: Space, *, alternate: bool = False
) -> tuple[Weight, Sequence[Tensor]]:
    """Matrices [N, K] one upon the other, or 16 rows of each of two in turn; with the tensors that it points to."""
    held = [part.detach().contiguous() for part in parts]
    if dtype == torch.bfloat16:
        held = [_taking_turns(held[0], held[1], space) if alternate else _stacked(held, space)]
    weight = Weight()
    for i, part in enumerate(held):
        weight.part[i], weight.rows[i] = part.data_ptr(), len(part)
    weight.alternate = alternate
    return weight, held


def _taking_turns(weight: Tensor, other: Tensor, space: Space) -> Tensor:
    rows, inputs = weight.shape
    out = space.take(-(-2 * rows // PANEL) * PANEL * inputs)
    call("pack", None, address(weight), address(other), rows, inputs, address(out))
    return out


def _stacked(parts: Sequence[Tensor], space: Space) -> Tensor:
    if any(len(part) % PANEL for part in parts[:-1]):
        parts = [torch.cat(list(parts))]
    inputs = parts[0].shape[1]
    out = space.take(-(-sum(map(len, parts)) // PANEL) * PANEL * inputs)
    at = 0
    for part in parts:
        call("pack", None, address(part), None, len(part), inputs, address(out[at:]))
        at += part.numel()
    return out
