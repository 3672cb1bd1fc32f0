"""Metrics to TensorBoard, trackio or Weights & Biases, as observers of a run.

Each package is imported when it is asked for. A resumed run continues the record that it had: TensorBoard drops
what was written after the step resumed from, W&B ignores steps it knows, trackio is told only steps that it
does not have.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenloom.train.errors import RecipeError
from tokenloom.train.events import Observer, Silent
from tokenloom.train.recipe import Recipe

log = logging.getLogger(__name__)


def make_trackers(recipe: Recipe, run: str | Path) -> list[Observer]:
    """The observers that `log.trackers` asks for, writing to or on behalf of the folder `run`.

    Nothing is opened before the first metrics arrive.

    Raises:
        RecipeError: when the package of one is missing, naming the extra that installs it.
    """
    made: list[Observer] = []
    for name in dict.fromkeys(recipe.log.trackers):
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"log.trackers: {name!r} needs the package {name}, which is not installed; "
                f"install it with: python -m pip install 'tokenloom[{name}]'"
            )
        made.append(Tracker(name, _OPEN[name], recipe, Path(run)))
    return made


Send = Callable[[int, dict[str, float]], None]
Open = Callable[[Recipe, Path, int, dict[str, Any]], tuple[Send, Callable[[], None]]]


class Tracker(Silent):
    """Hands every number of metrics.jsonl and timing.jsonl on, as `train/reward`, `eval/greedy`, `timing/seconds`.

    What a tracker raises costs a warning and its later metrics, never the run.
    """

    def __init__(self, name: str, opener: Open, recipe: Recipe, run: Path) -> None:
        self.name, self._open, self._recipe, self._run = name, opener, recipe, run
        self._send: Send | None = None
        self._close: Callable[[], None] | None = None
        self._failed = False
        self._memory: dict[str, Any] = {}
        self._file = run / f".{name}.json"

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """Send a training step."""
        self._guard(lambda: self._deliver(record["step"], named("train", record) | named("timing", timing), False))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Send an evaluation."""
        self._guard(lambda: self._deliver(record["step"], named("eval", record), True))

    def close(self) -> None:
        """Flush and let go."""
        if self._close is not None:
            self._guard(self._close)
            self._close = None

    def _deliver(self, step: int, values: dict[str, float], evaluation: bool) -> None:
        if self._send is None:
            self._memory = self._remembered()
            # An evaluation follows the training step of its number, whose record is to stay.
            first = step + 1 if evaluation and step else step
            self._send, self._close = self._open(self._recipe, self._run, first, self._memory)
        self._send(step, values)
        if self._memory and self._memory != self._remembered():
            self._file.write_text(json.dumps(self._memory), encoding="utf-8")

    def _remembered(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _guard(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            log.warning("%s failed and gets no more metrics: %s: %s", self.name, type(error).__name__, error)


def named(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names that trackers show; a key with a slash has its group already."""
    skipped = {"step", "kind"}
    return {
        key if "/" in key else f"{kind}/{key}": float(value)
        for key, value in record.items()
        if key not in skipped and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _tensorboard(recipe: Recipe, run: Path, first: int, memory: dict[str, Any]) -> tuple[Send, Callable[[], None]]:
    writer_class: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    writer = writer_class(log_dir=str(run / "tensorboard"), purge_step=first)

    def send(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, global_step=step)
        writer.flush()

    return send, writer.close


def _wandb(recipe: Recipe, run: Path, first: int, memory: dict[str, Any]) -> tuple[Send, Callable[[], None]]:
    wandb: Any = importlib.import_module("wandb")
    held = wandb.init(
        project=recipe.log.project,
        name=run.name,
        id=memory.setdefault("id", uuid.uuid4().hex),
        dir=str(run),
        config=recipe.resolved(),
        resume="allow",
    )
    return (lambda step, values: held.log(values, step=step)), held.finish


def _trackio(recipe: Recipe, run: Path, first: int, memory: dict[str, Any]) -> tuple[Send, Callable[[], None]]:
    trackio: Any = importlib.import_module("trackio")
    name = memory.setdefault("name", f"{run.name}-{uuid.uuid4().hex[:6]}")
    trackio.init(project=recipe.log.project, name=name, config=recipe.resolved(), resume="allow", embed=False)

    def send(step: int, values: dict[str, float]) -> None:
        # It would keep a second record of a step; the values are deterministic, so the first one stands.
        mark = [step, any(k.startswith("eval/") for k in values)]
        if mark > memory.get("sent", [-1, False]):
            trackio.log(values, step=step)
            memory["sent"] = mark

    return send, trackio.finish


_OPEN: dict[str, Open] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
