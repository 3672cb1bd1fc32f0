"""A cell of the table: one method on one task family with one seed, as JSON data that can be kept.

A cell is known by a hash of all that its numbers depend on: the method's composition with its hyperparameters, the
family, seed, budget and kind of policy, and the code (without comments and docstrings) of every Tokenloom module that
the method's parts and the laboratory reach, and of the user's own. Change any of it, and the cell is computed anew.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import time
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import get_preset
from tokenloom.lab.critic import Critic
from tokenloom.lab.estimate import measure
from tokenloom.lab.families import families
from tokenloom.lab.figures import as_json
from tokenloom.lab.intervals import finite
from tokenloom.lab.learn import learn
from tokenloom.lab.oracle import NAME, oracle
from tokenloom.lab.policy import LabPolicy
from tokenloom.lab.table import TablePolicy, unknown_to_tables
from tokenloom.lab.task import Task

Kind = Literal["table", "transformer"]


@dataclass(frozen=True)
class Budget:
    """How much a cell may measure: batches for credit and gradient, sampled responses for learning."""

    batches: int = 28
    samples: int = 1600
    group_size: int = 8


FULL = {"table": Budget(), "transformer": Budget(batches=6, samples=640)}
QUICK = {"table": Budget(batches=12, samples=640), "transformer": Budget(batches=4, samples=320)}


@dataclass(frozen=True)
class Cell:
    """What is to be measured. `method` is a preset's slug or import path, or the name of the oracle."""

    method: str
    family: str
    seed: int
    kind: Kind = "table"
    budget: Budget = field(default_factory=Budget)


def algorithm_of(method: str) -> Algorithm:
    """The composition of a method. Steps that only train a critic are left out: the lab's begins at the exact values.

    Raises:
        ValueError: for an unknown preset.
    """
    if method == NAME:
        return oracle()
    waiting = "value_pretraining" in get_preset(method).parameters
    return Algorithm.from_recipe({"preset": method} | ({"value_pretraining": 0} if waiting else {}))


def kind_of(algorithm: Algorithm) -> Kind:
    """The cheapest kind of policy that has every signal the algorithm reads."""
    return "transformer" if unknown_to_tables(sorted(algorithm.needs | algorithm.loss_needs)) else "table"


def run_cell(cell: Cell) -> dict[str, Any]:
    """The cell's record: its `status` is "done", "not run" (the `reason` says what is missing) or "failed"."""
    started = time.perf_counter()
    record: dict[str, Any] = asdict(cell)
    try:
        record |= {"status": "done", **_figures(cell)}
    except ValueError as error:
        record |= {"status": "not run", "reason": str(error)}
    except Exception as error:
        # One broken part must not take the other methods' figures with it; the record says what broke.
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return record | {"seconds": time.perf_counter() - started}


def _figures(cell: Cell) -> dict[str, Any]:
    algorithm, budget = algorithm_of(cell.method), cell.budget
    task = families()[cell.family].make(cell.seed)
    steps = -(-budget.samples // (task.prompts * budget.group_size))
    measured = measure(
        algorithm, task, _policy(cell, task), batches=budget.batches, group_size=budget.group_size,
        total_steps=steps, seed=2 * cell.seed,
    )  # fmt: skip
    learned = learn(
        algorithm, task, _policy(cell, task), samples=budget.samples, group_size=budget.group_size,
        seed=2 * cell.seed + 1, exact_critic=cell.method == NAME,
    )  # fmt: skip
    return {
        "gradient": as_json(measured.gradient),
        "credit": as_json(measured.credit),
        "advantages": as_json(measured.advantages),
        "learning": {
            "samples": learned.samples,
            "objective": [round(j, 5) for j in learned.objective],
            "best": learned.best,
            "samples_needed": finite(learned.samples_needed),
            "final": learned.objective[-1] / learned.best,
            "entropy_kept": learned.entropy_kept,
            "milliseconds": 1000 * learned.seconds,
            "skipped": learned.skipped,
        },
    }


def _policy(cell: Cell, task: Task) -> LabPolicy:
    critic = Critic(torch.zeros(task.logits.shape[:2], dtype=torch.float64))
    if cell.kind == "table":
        return TablePolicy(task.tree, task.logits, critic=critic)
    from tokenloom.lab.transformer import TransformerPolicy

    return TransformerPolicy.imitating(task, critic=critic, seed=cell.seed)


# -- keeping cells ------------------------------------------------------------------------------------


def key(cell: Cell) -> str:
    """A name for everything that the cell's numbers depend on, 20 hexadecimal digits."""
    algorithm = algorithm_of(cell.method)
    bounds = [bound for _, bound in algorithm.bound_parts()]
    bounds += [term.aggregate for term in algorithm.terms if term.aggregate]
    files = _reachable(sys.modules[__name__].__dict__)
    if cell.kind == "transformer":
        import tokenloom.policy

        files |= _reachable(tokenloom.policy.__dict__)
    for bound in bounds:
        files |= _reachable(bound.part.function.__globals__)
    code = [_code(Path(name)) for name in sorted(files)]
    text = json.dumps([algorithm.describe(), asdict(cell), code, torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _reachable(namespace: Mapping[str, Any]) -> set[str]:
    """Source files of a module and of every Tokenloom module that its names come from, and theirs."""
    found: dict[str, None] = {}
    waiting = [namespace]
    while waiting:
        here = waiting.pop()
        name = here.get("__file__")
        if name is None or name in found:
            continue
        found[name] = None
        for value in list(here.values()):
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith("tokenloom.") and home in sys.modules:
                waiting.append(sys.modules[home].__dict__)
    return set(found)


@cache
def _code(path: Path) -> str:
    """A hash of a file's code; comments and docstrings do not count."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
