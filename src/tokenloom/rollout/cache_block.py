"""By how many columns a cache grows at a time."""

from __future__ import annotations

import torch

from tokenloom.rollout.lean import Lean

_FEW, _MORE, _MANY = 16, 64, 128


def block_of(device: torch.device, lean: Lean) -> int:
    """Few where attention takes its time to each column, many where new shapes take time; to grow copies the cache.

    Compiled layers, which want multiples of 16, go no further than the last column in use.
    """
    if device.type != "cpu":
        return _MANY
    return _MORE if lean.compiled else _FEW
