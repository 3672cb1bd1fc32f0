"""Calls of compiled functions with tensors, visible to PyTorch's profiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.rollout.native.build import library


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def call(name: str, dtype: torch.dtype | None, *values: Any) -> None:
    """Call `name`, of the format `dtype` if it has formats, with addresses and counts, and the number of threads."""
    whole = name if dtype is None else name + ("_float32" if dtype == torch.float32 else "_bfloat16")
    function = getattr(library(), whole)
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"tokenloom::{whole}"):
            function(*values, torch.get_num_threads())
    else:
        function(*values, torch.get_num_threads())
