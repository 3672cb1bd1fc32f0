"""Masked and group (scatter) operations: the arithmetic that every method shares.

Letters: B rows, T response positions. A mask is bool [B, T]; group ids are int64 [B] in any
order, groups of any size, never assumed contiguous. Values outside a mask may be anything,
NaN and infinities included: they are replaced before arithmetic, so neither results nor
gradients see them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before `exp` (e^20 ~ 5e8 still squares safely in float32)."""


def valid_positions(lengths: Tensor, width: int) -> Tensor:
    """bool [B, width], True at the first `lengths[i]` positions of row i."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def row_index(index: Tensor | Sequence[int], device: torch.device | None = None) -> Tensor:
    """`index` as int64 [n].

    Raises:
        ValueError: for bools, which would silently read as rows 0 and 1.
    """
    at = torch.as_tensor(index, device=device).reshape(-1)
    if at.dtype == torch.bool:
        raise ValueError("rows are picked by index, not by a bool mask; use mask.nonzero().reshape(-1)")
    return at.to(torch.int64)


def where_mask(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`x` [B, T] (or broadcastable) on the mask and `fill` elsewhere; gradients off the mask are exactly zero."""
    return torch.where(mask, x, torch.full((), fill, dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the mask, of everything or along `dim`."""
    kept = where_mask(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the mask, of everything or along `dim`; 0 where nothing is selected."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, correction: int = 1) -> Tensor:
    """Variance over the mask (scalar), Bessel-corrected by default; 0 with too few values."""
    count = mask.sum()
    deviation = where_mask(x - masked_mean(x, mask), mask)
    return (deviation**2).sum() / (count - correction).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8, correction: int = 1) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, zero elsewhere; all zero when fewer than two values differ."""
    values = x[mask]
    if values.numel() < 2 or bool((values == values[0]).all()):
        # Equal values have no spread; their mean's rounding error over sqrt(eps) would look like one.
        return torch.zeros_like(x)
    kept = where_mask(x, mask)
    mean, var = masked_mean(kept, mask), masked_var(kept, mask, correction=correction)
    return where_mask((kept - mean) * torch.rsqrt(var + eps), mask)


def masked_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linearly interpolated `q`-quantile (scalar) over the mask; NaN when nothing is selected.

    Sorting instead of `torch.quantile`, which refuses more than 2**24 values.

    Raises:
        ValueError: for `q` outside [0, 1].
    """
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1], got {q}")
    values = x[mask].sort().values
    if values.numel() == 0:
        return torch.full((), float("nan"), dtype=x.dtype, device=x.device)
    position = q * (values.numel() - 1)
    low = int(position)
    high = min(low + 1, values.numel() - 1)
    return torch.lerp(values[low], values[high], position - low)


def clamped_exp(log_ratio: Tensor, mask: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """exp of a masked log-ratio [B, T]: masked and clamped *before* exp, so hostile padding never reaches it.

    Off the mask the value is exp(0) = 1 with zero gradient.
    """
    return where_mask(log_ratio, mask).clamp(-limit, limit).exp()


def last_position(mask: Tensor) -> Tensor:
    """bool [B, T], True at the last masked-in position of each row; all False in a row without any."""
    after = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (after == 1)


def at_last_position(x: Tensor, mask: Tensor) -> Tensor:
    """Put a row value [B] on the row's last sampled token: [B, T], zero elsewhere."""
    return where_mask(x[:, None].expand(mask.shape), last_position(mask))


def to_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Broadcast a row value [B] over the row's sampled tokens: [B, T], zero elsewhere."""
    return where_mask(x[:, None].expand(mask.shape), mask)


def group_index(group_ids: Tensor) -> tuple[Tensor, int]:
    """Dense group numbers [B] in 0..n-1 and n, for arbitrary int64 ids in arbitrary order."""
    unique, dense = torch.unique(group_ids, return_inverse=True)
    return dense, int(unique.numel())


def group_sum(x: Tensor, group_ids: Tensor, where: Tensor | None = None) -> Tensor:
    """Per row, the sum of `x` [B] over its group: [B]. `where` bool [B] leaves rows out of the sum."""
    dense, n = group_index(group_ids)
    kept = x if where is None else where_mask(x, where)
    return torch.zeros(n, dtype=x.dtype, device=x.device).index_add_(0, dense, kept)[dense]


def group_size(group_ids: Tensor, where: Tensor | None = None) -> Tensor:
    """Per row, how many rows (of `where`) its group has: [B] float64-safe integer counts as int64."""
    ones = torch.ones_like(group_ids)
    return group_sum(ones if where is None else where.to(ones.dtype), group_ids)


def group_mean(x: Tensor, group_ids: Tensor, where: Tensor | None = None) -> Tensor:
    """Per row, the mean of `x` [B] over its group: [B]; 0 for a group without any counted row."""
    return group_sum(x, group_ids, where) / group_size(group_ids, where).clamp(min=1).to(x.dtype)


def group_std(x: Tensor, group_ids: Tensor, where: Tensor | None = None, *, correction: int = 1) -> Tensor:
    """Per row, the standard deviation of `x` [B] over its group: [B]; exactly 0 where the group is constant.

    Constant groups are found by comparing values, not variances: rounding in the mean would
    otherwise leave a std near 1e-8, and dividing by it would turn noise into advantages of 1.
    """
    count = group_size(group_ids, where)
    kept = x if where is None else where_mask(x, where)
    deviation = kept - group_mean(kept, group_ids, where)
    var = group_sum(deviation**2, group_ids, where) / (count - correction).clamp(min=1).to(x.dtype)
    constant = group_constant(kept, group_ids, where)
    # sqrt has an infinite slope at 0, which would make the gradient of a constant group NaN.
    return torch.where(constant, torch.zeros_like(var), torch.where(constant, torch.ones_like(var), var).sqrt())


def group_extreme(x: Tensor, group_ids: Tensor, where: Tensor | None = None, *, largest: bool = True) -> Tensor:
    """Per row, the largest (or smallest) `x` [B] in its group: [B]; ∓inf for a group without any counted row."""
    dense, n = group_index(group_ids)
    worst = float("-inf") if largest else float("inf")
    kept = x if where is None else where_mask(x, where, worst)
    out = torch.full((n,), worst, dtype=x.dtype, device=x.device)
    return out.scatter_reduce_(0, dense, kept, "amax" if largest else "amin")[dense]


def group_constant(x: Tensor, group_ids: Tensor, where: Tensor | None = None) -> Tensor:
    """bool [B]: every counted `x` of the row's group is the same value (also true for groups of one or none)."""
    top = group_extreme(x, group_ids, where, largest=True)
    return top <= group_extreme(x, group_ids, where, largest=False)
