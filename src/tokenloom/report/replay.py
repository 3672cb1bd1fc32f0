"""What other algorithms would have done with the responses of a run, from the batches that a dump stored.

A batch holds the dumped rows only, so scales are normalized over these; the run's own algorithm (`OWN`) goes on from
the state that it had, any other from none. Old log-probs and values are those of the dump, which was made before the
update. An algorithm whose signals were not stored cannot be asked: `Replayed.reason` says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tokenloom.algorithm import Algorithm

OWN = "this run's"
QUANTITIES = ("advantage", "coefficient", "weight")


@dataclass(frozen=True)
class Replayed:
    """One algorithm: `values[folder][quantity]` is [B, T] over a folder's rows; or the reason why there is none."""

    name: str
    about: tuple[str, ...] = ()
    reason: str = ""
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def replay(run: Path, folders: Sequence[str], names: Sequence[str], recipe: Mapping[str, Any]) -> list[Replayed]:
    """Ask each of `names` (presets, import paths, or `OWN`) about the stored batches `folders` of a run.

    Raises:
        ValueError: for an unknown preset.
    """
    return [_one(run, folders, name, recipe) for name in dict.fromkeys(names)]


def covers_its_batch(run: Path, folder: str) -> bool:
    """Whether the dumped rows were the whole batch, so that their scales are those of the run."""
    try:
        about = json.loads((run / folder / "batch.json").read_text(encoding="utf-8"))
        rows = sum(1 for _ in _load(run / folder)[0].prompt_tokens)
    except (OSError, ValueError):
        return True
    return bool(about["batch_rows"] == rows)


def _one(run: Path, folders: Sequence[str], name: str, recipe: Mapping[str, Any]) -> Replayed:
    from tokenloom.algorithm import Algorithm

    algorithm = Algorithm.from_recipe(recipe.get("algorithm", {}) if name == OWN else name)
    label = f"{algorithm.preset}, these rows" if name == OWN else name
    if not folders:
        return Replayed(label, reason="this run stored no batch beside tokens.jsonl")
    values = {}
    for folder in folders:
        try:
            values[folder] = _values(run / folder, algorithm, own=name == OWN)
        except OSError as error:
            return Replayed(label, reason=f"{folder} cannot be read: {error.strerror or error}")
        except ValueError as error:
            return Replayed(label, reason=str(error))
    return Replayed(label, tuple(algorithm.describe()), "", values)


def _values(folder: Path, algorithm: Algorithm, *, own: bool) -> dict[str, Tensor]:
    from tokenloom.signals import Signals

    rollouts, found, about, state = _load(folder)
    for name in ("logprobs", "values"):
        if name in found:
            found.setdefault(f"old_{name}", found[name])
    missing = sorted((algorithm.needs | algorithm.loss_needs) - found.keys())
    missing += sorted(algorithm.rollout_needs - rollouts.extras.keys())
    if missing:
        raise ValueError(f"it needs {', '.join(missing)}, which this run did not store")
    signals = Signals().replace(**found)
    given = {"step": about["step"], "total_steps": about["total_steps"]}
    held = state if own else {}
    plan = algorithm.plan(rollouts, signals, held, one_update=True, **given)
    coefficients = algorithm.coefficients(rollouts, signals, held, **given)["logprobs"]
    return {"advantage": plan.values["advantages"], "coefficient": coefficients, "weight": plan.values["weights"]}


def _load(folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Rollouts, signals by name, `step`, `total_steps` and `batch_rows`, and the state of the run's own parts."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tokenloom.batch import Rollouts
    from tokenloom.train.checkpoint import unpack

    try:
        about = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        state = unpack(load_file(folder / "state.safetensors"), about.pop("state"))
        return Rollouts.load(folder), load_file(folder / "signals.safetensors"), about, state
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the batch in {folder.name} is damaged ({error})") from None
