"""Attention over prefix trees on CUDA: PyTorch's FlexAttention with a block mask made from the ancestor test.

Which blocks of node pairs are empty, full or mixed follows from extremes per block of nodes, in O(blocks^2) instead of
O(nodes^2): with the nodes in depth-first order, `k` is an ancestor of a later `q` exactly when q < leave[k].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tokenloom.policy.tree import PrefixTree

BLOCK = 128
"""Nodes along each side of a block; FlexAttention's own default."""


class FlexBlocks:
    """The block mask of a tree whose number of nodes is a multiple of BLOCK (see `tree.pad_tree`)."""

    def __init__(self, tree: PrefixTree, window: int | None, device: torch.device) -> None:
        if len(tree) % BLOCK:
            raise ValueError(f"a tree of {len(tree)} nodes does not fill blocks of {BLOCK}: pad it with pad_tree")
        mixed, full = block_kinds(tree, window)
        indices = [_packed(kind.to(device)) for kind in (mixed, full)]
        test = ancestor_test(tree.leave.to(device), tree.depth.to(device), window)
        self.mask = BlockMask.from_kv_blocks(*indices[0], *indices[1], BLOCK_SIZE=BLOCK, mask_mod=test)


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, blocks: FlexBlocks, scale: float) -> Tensor:
    """[1, H, M, d] from query, key and value [1, H, M, d]."""
    result: Tensor = _compiled()(query, key, value, block_mask=blocks.mask, scale=scale)
    return result


def ancestor_test(leave: Tensor, depth: Tensor, window: int | None) -> Callable[..., Tensor]:
    """FlexAttention's question: may node `q` see node `k`? Same answers as `tree.ancestor_mask`."""
    if window is None:
        return lambda b, h, q, k: (k <= q) & (q < leave[k])
    return lambda b, h, q, k: (k <= q) & (q < leave[k]) & (depth[q] - depth[k] < window)


def block_kinds(tree: PrefixTree, window: int | None) -> tuple[Tensor, Tensor]:
    """Two bool [M / BLOCK, M / BLOCK]: which blocks (of queries, of keys) may be mixed, and which are seen whole.

    Neither means that the block is empty. A mixed one may turn out empty or full under the node by node test.
    """
    leave, depth = tree.leave.view(-1, BLOCK), tree.depth.view(-1, BLOCK)
    first = torch.arange(0, len(tree), BLOCK)
    before = first[:, None] > first
    some = (leave.amax(1) > first[:, None]) & before
    whole = (leave.amin(1) >= first[:, None] + BLOCK) & before
    if window is not None:
        some &= depth.amin(1)[:, None] - depth.amax(1) < window
        whole &= depth.amax(1)[:, None] - depth.amin(1) < window
    return (some & ~whole) | torch.eye(len(first), dtype=torch.bool), whole


def _packed(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks how many are set, [1, 1, Q] int32, and which, in front, [1, 1, Q, K] int32."""
    order = torch.argsort(kind.to(torch.int8), dim=1, descending=True, stable=True)
    return kind.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


@cache
def _compiled() -> Any:
    # Shapes differ from call to call: without `dynamic` a few compilations later PyTorch would give up.
    return torch.compile(flex_attention, dynamic=True)
