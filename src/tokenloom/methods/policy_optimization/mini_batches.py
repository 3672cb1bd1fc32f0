"""Mini-batches: how a batch becomes optimizer steps (PPO, arXiv 1707.06347).

Each epoch shuffles the groups and deals them into `mini_batches` updates of nearly equal numbers of
groups; a group stays whole, so that group-coupled aggregation sees all of it. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import group_index


@part("mini-batches", stage="updates", scope="batch", paper="arXiv:1707.06347")
def mini_batches(
    group_ids: Tensor, keep: Tensor, generator: torch.Generator, *, epochs: int = 1, mini_batches: int = 1
) -> list[Tensor]:
    """Row indices [n] int64 of each update, kept rows only, ascending within an update.

    Raises:
        ValueError: for fewer than one epoch or mini-batch.
    """
    if epochs < 1 or mini_batches < 1:
        raise ValueError(f"epochs and mini_batches must be >= 1, got {epochs} and {mini_batches}")
    rows = keep.nonzero().reshape(-1)
    if rows.numel() == 0:
        return []
    dense, groups = group_index(group_ids[rows])
    updates = []
    for _ in range(epochs):
        # One mini-batch needs no shuffle, and skipping it keeps the generator's stream for parts that draw.
        order = torch.arange(groups, device=rows.device)
        if mini_batches > 1:
            order = torch.randperm(groups, generator=generator, device=rows.device)
        updates += [rows[torch.isin(dense, chunk)] for chunk in order.tensor_split(min(mini_batches, groups))]
    return updates
