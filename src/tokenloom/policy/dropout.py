"""Turning dropout off for good, so that sampling and training see the same policy."""

from __future__ import annotations

from typing import Any

from torch import nn

_MARKS = ("dropout", "pdrop", "layerdrop", "drop_path")


def zero_dropouts(model: nn.Module) -> list[str]:
    """Set every dropout rate of the modules and their configs to 0; names of those that were not 0."""
    changed: set[str] = set()
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            module.p = 0.0
            changed.add("p")
        _zero(module, changed)
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    for config in configs.values():
        _zero(config, changed)
    return sorted(changed)


def _zero(holder: Any, changed: set[str]) -> None:
    for name, value in list(vars(holder).items()):
        rate = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if rate and any(mark in name for mark in _MARKS):
            setattr(holder, name, 0.0)
            changed.add(name)
