"""Metrics in TensorBoard for real, resumed runs included; W&B and trackio against packages that record their calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli.tiny_run import make_tiny_model, tiny_recipe
from tokenloom.train import Recipe, load_recipe, train
from tokenloom.train.trackers import make_trackers, named


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(tiny_recipe(tmp_path, make_tiny_model(tmp_path)))


def tracked(recipe: Recipe, name: str, run: Path) -> Any:
    recipe.log.trackers = [name]  # type: ignore[list-item]  # a text that the section accepts
    (made,) = make_trackers(recipe, run)
    return made


def record(step: int, value: float = 0.5) -> dict[str, Any]:
    return {"step": step, "kind": "train", "reward": value, "surrogate/clipped": 0.25, "note": "text"}


TIMING = {"step": 1, "seconds": 2.0}


def test_names_are_grouped_and_only_numbers_are_sent() -> None:
    assert named("train", record(3) | {"flag": True}) == {"train/reward": 0.5, "surrogate/clipped": 0.25}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_jsonl_holds(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tokenloom[tensorboard] is not installed")
    run = tmp_path / "run"
    train(recipe, run, [tracked(recipe, "tensorboard", run)])
    found = events(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for kind, key in (("train", "reward"), ("train", "loss"), ("eval", "greedy")):
        expected = [(line["step"], line[key]) for line in lines if line["kind"] == kind]
        steps, values = zip(*found[f"{kind}/{key}"], strict=True)
        assert list(steps) == [s for s, _ in expected]
        assert list(values) == pytest.approx([v for _, v in expected], rel=1e-4, abs=1e-6)
    assert len(found["timing/tokens_per_second"]) == 3


def test_tensorboard_forgets_what_was_after_the_step_resumed_from(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tokenloom[tensorboard] is not installed")
    first = tracked(recipe, "tensorboard", tmp_path)
    first.evaluation({"step": 0, "kind": "eval", "greedy": 0.1})
    for step in (1, 2, 3, 4):
        first.step(record(step, step / 10), TIMING, 4)
    first.close()
    resumed = tracked(recipe, "tensorboard", tmp_path)
    for step in (3, 4):
        resumed.step(record(step, step), TIMING, 4)
    resumed.evaluation({"step": 4, "kind": "eval", "greedy": 0.9})
    resumed.close()
    found = events(tmp_path)
    assert [s for s, _ in found["train/reward"]] == [1, 2, 3, 4]
    assert [v for _, v in found["train/reward"]] == pytest.approx([0.1, 0.2, 3, 4])
    assert [s for s, _ in found["eval/greedy"]] == [0, 4]


class Recorded(ModuleType):
    """A package with `init`, `log` and `finish` that keeps its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.__spec__ = None

    def init(self, **options: Any) -> Recorded:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    found = {name: Recorded(name) for name in ("wandb", "trackio")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_the_record_it_had(
    recipe: Recipe, tmp_path: Path, installed: dict[str, Recorded], name: str
) -> None:
    for steps in ((1, 2, 3), (3, 4)):
        observer = tracked(recipe, name, tmp_path)
        for step in steps:
            observer.step(record(step), TIMING, 4)
        observer.close()
    calls = installed[name].calls
    inits = [options for kind, options in calls if kind == "init"]
    key = "id" if name == "wandb" else "name"
    assert len(inits) == 2
    assert inits[0][key] == inits[1][key]
    assert all(o["resume"] == "allow" and o["project"] == "tokenloom" for o in inits)
    assert [kind for kind, _ in calls].count("finish") == 2
    sent = [value[0] for kind, value in calls if kind == "log"]
    # W&B drops a step that it knows; trackio would show it twice.
    assert sent == ([1, 2, 3, 3, 4] if name == "wandb" else [1, 2, 3, 4])


def test_a_tracker_that_fails_never_stops_the_run(
    recipe: Recipe, tmp_path: Path, installed: dict[str, Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(values: dict[str, float], step: int) -> None:
        raise ConnectionError("no network")

    installed["wandb"].log = broken  # type: ignore[method-assign]  # that is the point
    observer = tracked(recipe, "wandb", tmp_path)
    for step in (1, 2):
        observer.step(record(step), TIMING, 4)
    observer.close()
    assert [r.getMessage() for r in caplog.records] == [
        "wandb failed and gets no more metrics: ConnectionError: no network"
    ]
