"""Sums over a vocabulary whose rows are spread over the processes of a group, as in Megatron-LM (arXiv 1909.08053).

Every process holds all hidden rows and a contiguous block of the vocabulary, in the order of the ranks; blocks
may differ in length. The loss must be the same on all processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenloom.kernels.chunked import Sums


def shard(words: int, group: Any, device: torch.device) -> tuple[int, int]:
    """First id of this process's `words` vocabulary rows, and the size of the whole vocabulary."""
    own = torch.tensor([words], device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    lengths = [int(n) for n in sizes]
    return sum(lengths[: dist.get_rank(group)]), sum(lengths)


def joined(sums: Sums, offset: int, group: Any) -> Sums:
    """The sums over the whole vocabulary, the same on every process, from each process's own."""
    m = sums.m.clone()
    dist.all_reduce(m, dist.ReduceOp.MAX, group=group)
    drop = sums.m - m
    keep = drop.exp()
    parts = [keep * sums.total, keep * (sums.spread + drop * sums.total), sums.chosen]
    together = torch.cat(parts)
    dist.all_reduce(together, group=group)
    total, spread, chosen = torch.split(together, [len(p) for p in parts])
    return Sums(m, total, spread, chosen, None if sums.top is None else _joined_top(sums.top, offset, group))


def _joined_top(top: tuple[Tensor, Tensor], offset: int, group: Any) -> tuple[Tensor, Tensor]:
    k = top[0].shape[1]
    values, tokens = (_gathered(x, group) for x in (top[0], top[1] + offset))
    best = values.topk(k, -1)
    return best.values, tokens.gather(-1, best.indices)


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)
