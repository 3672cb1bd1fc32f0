"""A critic: one float32 linear map on the policy's last hidden state."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(state before token t) from the hidden state that predicts token t.

    Zero at the start, so that the first advantages are the returns themselves. `detach` cuts the
    gradient into the trunk.
    """

    def __init__(self, hidden_size: int, *, detach: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [N], in the head's format, of hidden states [N, D]."""
        trunk = hidden.detach() if self.detach else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            return cast(Tensor, self.linear(trunk.to(self.linear.weight.dtype)))[:, 0]
