"""Attention of a few queries over a cache, as two batched products on the key/value heads.

scores = q k' scaling + mask, out = softmax(scores) v. The query heads that share a key/value head are rows of one
product, so keys and values are neither repeated nor copied, which PyTorch's fused kernel does for every query head.

Letters: B rows, n queries of a row, S keys, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKED = -1e30
"""Added to the score of a key that is not seen; far from the ends of every format."""


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[B, n, H D] from queries [B, n, H, D], keys and values [B K, S, D], H a multiple of K.

    `mask` [B or 1, 1, n or 1, S] is added to the scores. Products are in the formats of keys and values, the softmax
    at least in float32.
    """
    b, n, heads, size = query.shape
    groups, shared = len(keys) // b, heads * b // len(keys)
    apart = query.to(keys.dtype).view(b, n, groups, shared, size)
    # With one query this moves nothing.
    rows = apart.permute(0, 2, 3, 1, 4).reshape(b * groups, shared * n, size)
    casts = torch.is_autocast_enabled(query.device.type)
    torch.set_autocast_enabled(query.device.type, False)
    try:
        scores = torch.baddbmm(_bias(mask.to(keys.dtype), b, groups, shared), rows, keys.transpose(1, 2), alpha=scaling)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = torch.bmm(torch.softmax(scores, -1, dtype=wide).to(values.dtype), values)
    finally:
        torch.set_autocast_enabled(query.device.type, casts)
    return out.view(b, groups, shared, n, -1).permute(0, 3, 1, 2, 4).reshape(b, n, -1)


def _bias(mask: Tensor, b: int, groups: int, shared: int) -> Tensor:
    """The mask as a term of the scores, [1 or b groups, 1 or shared n, S]."""
    rows, _, n, width = mask.shape
    if rows == n == 1:
        return mask[0]
    shared = 1 if n == 1 else shared
    return mask[:, :, None].expand(b, groups, shared, n, width).reshape(b * groups, shared * n, width)
