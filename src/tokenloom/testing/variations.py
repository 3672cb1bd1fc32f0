"""Variations of the values that a part is called with, and whether two results are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.signals import CHUNK_SIGNALS

HOSTILE = (float("nan"), float("inf"), float("-inf"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""float64 as the architecture says; float32: sums of about 100 terms of size up to 10 at 6e-8 each."""


def same(a: Tensor, b: Tensor, message: str) -> None:
    """Assert equality up to the tolerance of the dtype; infinities must agree exactly.

    Raises:
        AssertionError: with the largest difference.
    """
    assert a.shape == b.shape, f"{message}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype == torch.bool:
        assert torch.equal(a, b), message
        return
    assert a.dtype == b.dtype, f"{message}: dtypes {a.dtype} and {b.dtype}"
    tolerance = TOLERANCE.get(a.dtype, 0.0)
    if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{message}: largest difference {(a - b).abs().max():.3g}")


def differentiable() -> list[str]:
    """Every name that has gradient in a loss, registered chunk signals included."""
    return ["logprobs", "entropies", "values", "log_ratio", "ratio", *CHUNK_SIGNALS]


def with_gradients(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with leaves of their own where a loss has gradient."""
    return values | {n: values[n].detach().clone().requires_grad_() for n in differentiable()}


def poison(values: dict[str, Any], mask: Tensor, fill: float) -> dict[str, Any]:
    """The values, with `fill` off the mask of every float tensor [B, T] or [B, T, K]."""

    def poisoned(v: Any) -> Any:
        if not (is_float(v) and v.shape[:2] == mask.shape):
            return v
        inside = mask if v.ndim == 2 else mask[..., None]
        return torch.where(inside, v, torch.full((), fill, dtype=v.dtype))

    return {k: poisoned(v) for k, v in values.items()}


def is_float(value: Any) -> bool:
    """Whether a value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()


def pad(value: Any, width: int, by: int) -> Any:
    """A tensor [B, T = `width`, ...] with `by` more positions; any other value as it is."""
    wide = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == width
    return torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, by)) if wide else value


def take(value: Any, rows: Tensor, number: int) -> Any:
    """The rows at `rows` of what has one entry for each of `number` rows; any other value as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == number:
        return value[rows]
    if isinstance(value, tuple) and len(value) == number:
        return tuple(value[i] for i in rows.tolist())
    return value
