"""Tokenloom: token-level methods for language models as small, tested, interchangeable parts.

>>> import tokenloom
>>> print(tokenloom.Algorithm.from_recipe("dr-grpo").describe()[0])
advantage  dr-grpo/center()  [arXiv:2503.20783]

Importing this package needs PyTorch and nothing else; what drives a model is imported by name
(`tokenloom.policy`, `tokenloom.rollout`, `tokenloom.train`) and needs the `train` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokenloom.algorithm import Algorithm
    from tokenloom.batch import Rollouts, Sampling
    from tokenloom.catalog import get_part, get_preset, part, parts, preset, presets
    from tokenloom.composition import Bound, Term, bind
    from tokenloom.plan import Metrics, Plan, Update
    from tokenloom.schedule import Schedule
    from tokenloom.signals import Signals, chunk_signal

_HOMES = {
    "Algorithm": "algorithm",
    "Rollouts": "batch",
    "Sampling": "batch",
    "get_part": "catalog",
    "get_preset": "catalog",
    "part": "catalog",
    "parts": "catalog",
    "preset": "catalog",
    "presets": "catalog",
    "Bound": "composition",
    "Term": "composition",
    "bind": "composition",
    "Metrics": "plan",
    "Plan": "plan",
    "Update": "plan",
    "Schedule": "schedule",
    "Signals": "signals",
    "chunk_signal": "signals",
}

__all__ = [
    "Algorithm", "Bound", "Metrics", "Plan", "Rollouts", "Sampling", "Schedule", "Signals", "Term", "Update", "bind",
    "chunk_signal", "get_part", "get_preset", "part", "parts", "preset", "presets",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, so that a verifier's worker process can import tokenloom.tasks without paying for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenloom.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tokenloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
