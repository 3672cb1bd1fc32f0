"""Attention over the cache equals PyTorch's, for every form of mask; what is blocked never shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.rollout.attention import BLOCKED, attend

B, HEADS, GROUPS, SIZE, WIDTH = 3, 6, 2, 8, 11


def draw(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(B, n, HEADS, SIZE), (B, GROUPS, WIDTH, SIZE), (B, GROUPS, WIDTH, SIZE)]
    query, key, value = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return query, key, value


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    keys, values = key.flatten(0, 1).transpose(1, 2).contiguous().transpose(1, 2), value.flatten(0, 1)
    return attend(query, keys, values, mask, 0.3)


def theirs(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), key, value, seen, scale=0.3)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("rows", "queries", "n"), [(1, 1, 1), (B, 1, 1), (B, 4, 4), (1, 4, 4), (1, 1, 4)])
def test_every_form_of_mask(rows: int, queries: int, n: int) -> None:
    query, key, value = draw(n, torch.float64)
    seen = torch.rand(rows, 1, queries, WIDTH, generator=torch.Generator().manual_seed(9)) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, BLOCKED)
    expected = theirs(query, key, value, seen.expand(B, 1, n, WIDTH))
    assert torch.allclose(ours(query, key, value, mask), expected, atol=1e-12)


def test_blocked_keys_may_hold_anything_finite() -> None:
    query, key, value = draw(1, torch.float32)
    mask = torch.zeros(1, 1, 1, WIDTH)
    mask[..., 5:] = BLOCKED
    before = ours(query, key, value, mask)
    key[:, :, 5:], value[:, :, 5:] = 1e15, -1e15
    assert torch.equal(ours(query, key, value, mask), before)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_format_of_the_cache(kept: torch.dtype) -> None:
    query, key, value = draw(1, torch.float32)
    mask = torch.zeros(1, 1, 1, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(query, key.to(kept), value.to(kept), mask)
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == kept
    expected = theirs(query, key, value, torch.ones(1, 1, 1, WIDTH, dtype=torch.bool))
    # Averages of about 11 values up to 3, each product rounded to 8 bits in bfloat16.
    assert torch.allclose(out.float(), expected, atol=1e-5 if kept == torch.float32 else 3e-2)
