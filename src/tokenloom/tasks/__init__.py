"""Tasks: problems, how answers are verified, and multi-turn environments."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenloom.tasks.config import RewardConfig, SourceConfig, TaskConfig
    from tokenloom.tasks.environment import Environment, Observation, Step
    from tokenloom.tasks.item import Item
    from tokenloom.tasks.split import Split, split_items
    from tokenloom.tasks.task import EnvironmentFactory, Task, check_task, load_task
    from tokenloom.tasks.verify import Scores, Verifier

# Looked up on first use: worker processes import this package and should pay for nothing else.
_HOME = {
    "RewardConfig": "config",
    "SourceConfig": "config",
    "TaskConfig": "config",
    "Environment": "environment",
    "Observation": "environment",
    "Step": "environment",
    "Item": "item",
    "Split": "split",
    "split_items": "split",
    "EnvironmentFactory": "task",
    "Task": "task",
    "check_task": "task",
    "load_task": "task",
    "Scores": "verify",
    "Verifier": "verify",
}

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "Item",
    "Observation",
    "RewardConfig",
    "Scores",
    "SourceConfig",
    "Split",
    "Step",
    "Task",
    "TaskConfig",
    "Verifier",
    "check_task",
    "load_task",
    "split_items",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
