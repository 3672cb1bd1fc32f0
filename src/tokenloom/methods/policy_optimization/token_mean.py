"""Token mean: every token of the update counts alike.

scale = mask / sum(mask)                                                             [B, T]
With count="weights", the denominator is sum(mask * weights): only selected tokens count.
Also known as verl's "token-mean" and TRL's "dapo" / "bnpo" normalization. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import where_mask


@part("token-mean", stage="aggregate", scope="batch", paper="arXiv:2503.14476")
def token_mean(mask: Tensor, weights: Tensor | None = None, *, count: Literal["mask", "weights"] = "mask") -> Tensor:
    """Scale [B, T] with sum 1 over the mask.

    >>> import torch
    >>> token_mean(torch.tensor([[True, True, True], [True, False, False]]))
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.0000, 0.0000]])
    """
    counted = counted_tokens(mask, weights, count)
    return mask / counted.sum().clamp(min=_tiny(count))


def counted_tokens(mask: Tensor, weights: Tensor | None, count: Literal["mask", "weights"]) -> Tensor:
    """What a token contributes to a normalizer [B, T]: 1 on the mask, or its weight.

    Raises:
        ValueError: when weights are to be counted but are not given.
    """
    if count == "mask":
        return mask.to(weights.dtype if weights is not None else None)
    if weights is None:
        raise ValueError("count='weights' needs the weights that are to be counted")
    return where_mask(weights, mask)


def _tiny(count: str) -> float:
    # Counts of tokens are at least 1 when any token is there; a sum of weights may be any positive number.
    return 1.0 if count == "mask" else 1e-8
