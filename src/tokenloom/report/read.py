"""`read_run`: a run folder as data, whatever state a crash left it in."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenloom.report.jsonl import number, read_objects
from tokenloom.report.tokens import MAX_RESPONSES, TokenDump, read_tokens

RUN_FILES = ("recipe.yaml", "run.json", "metrics.jsonl")
MAX_RECIPE = 200_000
_HOW = "A run folder is made by `tokenloom train RECIPE`, which prints its path at the end."


@dataclass(frozen=True)
class RunData:
    """One run as its folder tells it.

    `train`, `evals` and `timing` hold one object per step, ascending; `samples` is in file order.
    `notes` says in sentences what was missing, empty or torn. Every container may be empty.
    """

    path: Path
    name: str
    recipe_text: str
    recipe: dict[str, Any]
    info: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    tokens: TokenDump
    notes: tuple[str, ...]


def read_run(path: str | Path, *, max_responses: int = MAX_RESPONSES, step: int | None = None) -> RunData:
    """Read the run folder at `path`, with at most `max_responses` token dumps, of one `step` (-1: the last) if given.

    Raises:
        ValueError: when `path` is not a run folder (none of recipe.yaml, run.json, metrics.jsonl in
            it); damaged files inside a run never raise, they are described in `notes`.
    """
    folder = Path(path)
    _require_run(folder)
    notes: list[str] = []
    recipe_text = _text(folder / "recipe.yaml", notes, "the settings cannot be shown")
    info_text = _text(folder / "run.json", notes, "versions, machine and algorithm are unknown")
    metrics = [m for _, m in read_objects(folder / "metrics.jsonl", notes, "there are no curves")]
    timing = [m for _, m in read_objects(folder / "timing.jsonl", notes, "durations are unknown")]
    samples = [m for _, m in read_objects(folder / "samples.jsonl", notes, "there are no answers to compare")]
    return RunData(
        path=folder,
        name=folder.resolve().name or str(folder),
        recipe_text=recipe_text,
        recipe=_recipe(recipe_text, notes),
        info=_info(info_text, notes),
        train=_by_step([m for m in metrics if m.get("kind", "train") == "train"]),
        evals=_by_step([m for m in metrics if m.get("kind") == "eval"]),
        timing=_by_step(timing),
        samples=samples,
        tokens=read_tokens(folder / "tokens.jsonl", notes, max_responses=max_responses, step=step),
        notes=tuple(notes),
    )


def _require_run(folder: Path) -> None:
    if any((folder / name).is_file() for name in RUN_FILES):
        return
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise ValueError(f"{folder} does not exist.{hint} {_HOW}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a run folder; give the folder: {folder.parent}. {_HOW}")
    inside = sorted(p.name for p in folder.iterdir())
    runs = [name for name in inside if any((folder / name / f).is_file() for f in RUN_FILES)]
    holds = f"it holds {', '.join(inside[:6])}{', …' if len(inside) > 6 else ''}" if inside else "it is empty"
    hint = f" Did you mean {folder / runs[-1]}?" if runs else ""
    raise ValueError(f"{folder} is not a run folder: none of {', '.join(RUN_FILES)} is in it ({holds}).{hint} {_HOW}")


def _text(path: Path, notes: list[str], consequence: str) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be opened ({error.strerror}): {consequence}.")
        return ""
    if not text.strip():
        notes.append(f"{path.name} is empty: {consequence}.")
    return text[:MAX_RECIPE]


def _recipe(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append("recipe.yaml is not valid YAML: shown as text only.")
        return {}
    return value if isinstance(value, dict) else {}


def _info(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        notes.append("run.json is not valid JSON: versions, machine and algorithm are unknown.")
        return {}
    return value if isinstance(value, dict) else {}


def _by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per step, ascending; the last line of a step counts (a resumed run writes it again)."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is not None:
            steps[int(step)] = line
    return [steps[s] for s in sorted(steps)]
