"""Gradients of large weights that are added to `.grad` where they are computed.

Autograd takes a gradient as a tensor of its own and adds it to `.grad` afterwards; for a weight that is used twice, as
tied embeddings are, it keeps the first part until the second is there, through the whole backward in between. For a
vocabulary's weights that is one or two hundred megabytes, and pieces that large find no place among what the heap has
free. `Policy.backward` lets functions add to `.grad` themselves; in any other backward, such as `torch.autograd.grad`,
they return gradients as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_local = threading.local()


@contextmanager
def accumulating() -> Iterator[None]:
    """While it lasts, a backward in this thread may add to `.grad` directly; it must be one that accumulates.

    On a CPU a backward runs in the thread that calls it.
    """
    before = getattr(_local, "open", False)
    _local.open = True
    try:
        yield
    finally:
        _local.open = before


def accumulator(weight: Tensor) -> Tensor | None:
    """`.grad` of `weight`, made of zeros if there is none, to add to; None when the gradient is to be returned.

    Only plain parameters on the CPU that nobody listens to: hooks want to see gradients, and where a parameter is a
    part of something else, its gradient is somebody else's too.
    """
    if not getattr(_local, "open", False) or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return None
    if weight.device.type != "cpu" or not weight.requires_grad:
        return None
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return None
    held = weight.grad
    if held is None:
        held = weight.grad = torch.zeros_like(weight)
    plain = type(held) is Tensor and held.layout == torch.strided and not held.requires_grad
    return held if plain and held.dtype == weight.dtype else None
