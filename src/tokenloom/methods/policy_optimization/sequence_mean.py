"""Sequence mean of token means: every response counts alike, whatever its length (GRPO, arXiv 2402.03300).

scale = mask / (rows * len_i)                                                        [B, T]
rows="live" counts rows with at least one sampled token (default); rows="all" counts every row of the
update, as TRL does, so that fully masked rows dilute the others. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.policy_optimization.token_mean import counted_tokens


@part("sequence-mean", stage="aggregate", scope="batch", paper="arXiv:2402.03300")
def sequence_mean(
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    count: Literal["mask", "weights"] = "mask",
    rows: Literal["live", "all"] = "live",
) -> Tensor:
    """Scale [B, T]; each counted row sums to 1 / rows.

    >>> import torch
    >>> sequence_mean(torch.tensor([[True, True], [True, False]]))
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    per_row = counted_tokens(mask, weights, count).sum(-1, keepdim=True)
    live = per_row > 0
    number = live.sum() if rows == "live" else live.numel()
    return mask * live / (per_row.masked_fill(~live, 1.0) * max(int(number), 1))
