"""Matrix products and exponentials in the fastest form this machine has for them.

A CPU build of PyTorch sends float32 products and exponentials to MKL, which on processors that are not
Intel's takes half the speed of what oneDNN reaches in products (measured on a Zen 5: 220 against 460
GFLOP/s on two cores) and four times as long in `exp` and `tanh` as the vectorized `exp2` and `sigmoid`.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)

_CONVERTED_ROWS = 128
"""Rows that a CPU converts between formats at once."""

_X86 = platform.machine().lower() in ("x86_64", "amd64")


class Scratch:
    """Buffers by name, kept from use to use: allocating megabytes anew for every tile fragments the heap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Buffer `name` in this shape, with what its last use left in it; a name always has the same format."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            buffer = self._buffers.get(name)
            if buffer is None or len(buffer) < size:
                buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=self._device)
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
            view = self._views[name, shape] = buffer[:size].view(shape)
        return view


def matmul(a: Tensor, b: Tensor, scratch: Scratch, name: str, into: Tensor | None = None) -> Tensor:
    """a [n, k] @ b [k, m] -> [n, m], all of one format; in `into`, in buffer `name`, or where oneDNN allocates it."""
    fast = _onednn() if a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0 else None
    if fast is not None:
        return fast(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=scratch.take(name, (len(a), b.shape[1]), a.dtype) if into is None else into)


def add_product(total: Tensor, a: Tensor, b: Tensor, scratch: Scratch, *, overwrite: bool = False) -> None:
    """Add a [n, k] @ b [k, m] to `total` [n, m], or write it there, whatever the format of `total` is."""
    same = total.dtype == a.dtype
    product = matmul(a, b, scratch, "product", into=total if same and overwrite else None)
    if product is total:
        return
    if overwrite:
        total.copy_(product)
    elif same or total.device.type != "cpu":
        total.add_(product)
    else:
        # On a CPU PyTorch would convert the whole product into new memory first.
        for rows in (slice(i, i + _CONVERTED_ROWS) for i in range(0, len(total), _CONVERTED_ROWS)):
            total[rows] += scratch.take("converted", tuple(total[rows].shape), total.dtype).copy_(product[rows])


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [n, m] in `dtype`; a narrower format takes the place of `x` in memory, so that both never exist at once."""
    if dtype.itemsize >= x.dtype.itemsize:
        return x.to(dtype)
    narrow = x.view(-1).view(dtype)[: x.numel()].view(x.shape)
    # A block ends up where earlier blocks, already converted, were.
    step = max(_CONVERTED_ROWS, len(x) // 16)
    for rows in (slice(i, i + step) for i in range(0, len(x), step)):
        narrow[rows] = x[rows].to(dtype)
    return narrow


def exp_(x: Tensor) -> Tensor:
    """exp(x) in place; the argument is rounded once more, by eps |x|, on its way to the base of two."""
    return x.mul_(LOG2_E).exp2_()


def tanh_(x: Tensor, inner: float, outer: float) -> Tensor:
    """outer * tanh(inner * x) in place, from tanh(y) = 2 sigmoid(2 y) - 1; the error is eps * outer everywhere."""
    return x.mul_(2 * inner).sigmoid_().mul_(2 * outer).sub_(outer)


def _onednn() -> Callable[..., Tensor] | None:
    """The product x [n, k], w [m, k] -> x @ w.T of oneDNN, where PyTorch has it and it is the faster one."""
    backend = cast(Any, torch.backends.mkldnn)
    if not (_X86 and backend.is_available() and backend.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
