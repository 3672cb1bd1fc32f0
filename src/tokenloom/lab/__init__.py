"""The laboratory: methods measured on token tasks so small that the truth is known exactly.

Importing it needs PyTorch and nothing of transformers; methods that read hidden states or attention do when they run.
"""

from tokenloom.lab.bench import Plan, run_lab
from tokenloom.lab.exact import Exact, solve
from tokenloom.lab.families import Family, families, family
from tokenloom.lab.task import Draft, Task
from tokenloom.lab.tree import Tree

__all__ = ["Draft", "Exact", "Family", "Plan", "Task", "Tree", "families", "family", "run_lab", "solve"]
