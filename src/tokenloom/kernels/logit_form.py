"""What stands between the product of a hidden state with a vocabulary row and the logit that is sampled from.

logit = cap(scale * (product + bias)) / temperature,   cap(x) = c tanh(x / c), or x without a soft-cap
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenloom.kernels.products import tanh_


class LogitForm(NamedTuple):
    """Scalars of the formula and the format `product` in which hidden states meet the vocabulary."""

    scale: float
    softcap: float | None
    temperature: float
    product: torch.dtype

    @property
    def math(self) -> torch.dtype:
        """Format of everything but the matrix products."""
        return torch.float64 if self.product == torch.float64 else torch.float32

    @property
    def factor(self) -> float:
        """d logit / d product at the product 0."""
        return self.scale / self.temperature

    def logits_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Turn products [n, v] into logits in place; `bias` [v]."""
        if bias is not None:
            products.add_(bias)
        if self.softcap is not None:
            return tanh_(products, self.scale / self.softcap, self.softcap / self.temperature)
        return products if self.factor == 1.0 else products.mul_(self.factor)

    def slope(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """d logit / d product, relative to `factor`, at given logits; for a form with a soft-cap."""
        if self.softcap is None:
            raise AssertionError("without a soft-cap the slope is `factor` everywhere")
        part = torch.mul(logits, self.temperature / self.softcap, out=out)
        return part.square_().neg_().add_(1.0)
