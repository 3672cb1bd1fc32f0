"""The tokens of each row with the largest scores, an exact number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.masked import where_mask


def top_by_row(scores: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    """bool [B, T]: the `number` [B] sampled tokens of each row with the largest scores, the earlier of equal ones.

    >>> scores, one = torch.tensor([[3.0, 1.0, 3.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> top_by_row(scores, one, torch.tensor([2]))
    tensor([[ True, False,  True, False]])
    """
    order = where_mask(scores.detach(), mask, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    rank = torch.zeros_like(order).scatter(-1, order, places)
    return mask & (rank < number[:, None])


def counted_up(share: float, mask: Tensor) -> Tensor:
    """ceil(share * sampled tokens) of each row, at least 1: [B]. Rounding noise of `share` does not add a token."""
    return torch.ceil(share * mask.sum(-1).double() - 1e-6).clamp(min=1)
