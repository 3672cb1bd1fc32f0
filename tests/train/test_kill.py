"""A run that is killed, again and again, ends as if nothing had happened.

The killed processes run the command line. They are forked from one that has imported PyTorch, so that a
kill costs a fraction of a second; the slow test starts `python -m tokenloom` anew each time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train.command_line
from train.setups import Tiny, lines, same_results

KILLED = -signal.SIGKILL if hasattr(signal, "SIGKILL") else -9
ROOT = Path(__file__).parents[2]
TRAINING: dict[str, Any] = {
    "steps": 12, "learning_rate": 0.01, "checkpoint_every": 1, "keep_checkpoints": 2,
    "eval": {"every": 3, "samples": 2, "problems": 4},
}  # fmt: skip
REPORT = "log.report=false"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / p) for p in ("src", "tests"))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


class CommandLine:
    """Runs the command line, and kills it after `seconds`, or where `die` says."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, train.command_line.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
        )  # fmt: skip
        assert self._answer() == {"ready": True}

    def __call__(
        self, *arguments: str | Path, seconds: float | None = None, die: tuple[str, int, str] | None = None
    ) -> int:
        request = {"arguments": [str(a) for a in arguments], "output": str(self.output), "die": die}
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        pid = self._answer()["pid"]
        timer = None
        if seconds is not None:
            # The process stays a zombie until the server has waited for it, so its number cannot be another's.
            timer = threading.Timer(seconds, _kill, [pid])
            timer.start()
        status = int(self._answer()["status"])
        if timer is not None:
            timer.cancel()
        return status

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.output.read_text(encoding="utf-8") if self.output.exists() else "no answer"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    made = CommandLine(tmp_path_factory.mktemp("command"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def recipe(tiny: Tiny) -> Path:
    """Everything that a checkpoint must hold: state, dynamic sampling's position, several updates, warm-up."""
    file = tiny.folder / "kill.json.yaml"
    algorithm = {"preset": "reinforce", "running_baseline": True, "updates": {"mini_batches": 2}}
    settings = TRAINING | {"warmup_steps": 2, "schedule": "cosine"}
    data = tiny.data(train=settings, algorithm=algorithm, log={"tokens_every": 2, "tokens_rows": 4, "samples": 2})
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(command: CommandLine, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody disturbed, and the seconds that it took."""
    run = tmp_path_factory.mktemp("whole") / "run"
    started = time.monotonic()
    status = command("train", recipe, "--out", run, REPORT)
    assert status == 0, command.output.read_text(encoding="utf-8")
    return run, time.monotonic() - started


def resume(recipe: Path, run: Path) -> list[str | Path]:
    """The arguments of a person who comes back to a run."""
    return ["train", "--resume", run] if (run / "recipe.yaml").exists() else ["train", recipe, "--out", run, REPORT]


def finish(command: CommandLine, recipe: Path, run: Path) -> None:
    assert command(*resume(recipe, run)) == 0, command.output.read_text(encoding="utf-8")
    described = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert described["finished"]
    assert described["seed"] == 0
    left = [p for p in run.rglob(".*") if p.name != ".lock"]
    assert left == []
    assert len(list((run / "checkpoints").iterdir())) <= TRAINING["keep_checkpoints"]


def test_random_kills(command: CommandLine, recipe: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """At 20 random moments or more; a run that comes to its end before that is followed by another."""
    undisturbed, seconds = whole
    moments, kills, number, reached = random.Random(0), 0, 0, set()
    patience = seconds / 2
    while kills < 20 or number == 0:
        run = tmp_path / f"run-{number}"
        while kills < 20:
            before = lines_so_far(run)
            status = command(*resume(recipe, run), seconds=patience * moments.random())
            if status == 0:
                break
            assert status == KILLED, command.output.read_text(encoding="utf-8")
            kills += 1
            gained = lines_so_far(run) - before
            reached.add(lines_so_far(run))
            # However busy the machine is: a kill in every few steps, and some before the first.
            patience *= 1.3 if gained <= 0 else 0.8
        finish(command, recipe, run)
        same_results(undisturbed, run)
        number += 1
    assert len(reached) > 3


def lines_so_far(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


CALLS = {"rename": 4, "replace": 4, "append": 6, "update": 3, "rollout": 3, "file": 5, "cut": 1, "model": 1}


@pytest.mark.parametrize("what", sorted(CALLS))
def test_kills_at_every_turn(
    command: CommandLine, recipe: Path, whole: tuple[Path, float], tmp_path: Path, what: str
) -> None:
    """Before and after the first calls of each kind; what one attempt leaves behind, the next continues."""
    run = tmp_path / "run"
    if what == "cut":
        assert command(*resume(recipe, run), die=("update", 3, "after")) == KILLED
    kills = 0
    for count in range(1, CALLS[what] + 1):
        for when in ("before", "after"):
            status = command(*resume(recipe, run), die=(what, count, when))
            assert status in (KILLED, 0), command.output.read_text(encoding="utf-8")
            kills += status == KILLED
    assert kills >= 2
    finish(command, recipe, run)
    same_results(whole[0], run)


def test_a_kill_in_the_renames_of_every_checkpoint(
    command: CommandLine, recipe: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Just before a checkpoint appears, just after, and before and after an old one goes."""
    run, turn = tmp_path / "run", 0
    while (status := command(*resume(recipe, run), die=("rename", 1 + turn % 3, ("before", "after")[turn % 2]))) != 0:
        assert status == KILLED, command.output.read_text(encoding="utf-8")
        turn += 1
        assert turn < 60
    assert turn >= 12
    finish(command, recipe, run)
    same_results(whole[0], run)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"preset": "dapo"},
        {"preset": "ppo-gae", "updates": {"epochs": 2, "mini_batches": 2}},
        {"preset": "clip-cov", "updates": {"epochs": 2}},
        {"preset": "grpo", "kl_coef": 0.1},
    ],
    ids=lambda a: a["preset"],
)
def test_algorithms_of_every_kind_resume(
    command: CommandLine, tiny: Tiny, tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    """Dynamic sampling's position, a critic, random tokens, a reference model: all as if undisturbed."""
    recipe = tiny.recipe(algorithm=algorithm, train=TRAINING | {"steps": 5}, log={"report": False})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert command("train", file, "--out", tmp_path / "whole") == 0
    run = tmp_path / "run"
    for what, count, when in (("update", 2, "after"), ("rollout", 4, "after"), ("file", 5, "before")):
        assert command(*resume(file, run), die=(what, count, when)) == KILLED
    finish(command, file, run)
    same_results(tmp_path / "whole", run)


def test_a_curriculum_resumes(command: CommandLine, tiny: Tiny, tmp_path: Path) -> None:
    text = tiny.problems.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("easy", text[:9]), ("hard", text[9:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    sources = [{"source": str(tmp_path / f"{name}.jsonl")} for name in ("easy", "hard")]
    task = {"sources": sources, "curriculum": True, "heldout": 6, "rewards": [{"verifier": "number"}]}
    data = tiny.data(train=TRAINING | {"steps": 8}) | {"task": task}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(data), encoding="utf-8")
    assert command("train", file, "--out", tmp_path / "whole", REPORT) == 0
    run = tmp_path / "run"
    for count in (3, 1, 2):
        assert command(*resume(file, run), die=("update", count, "before")) == KILLED
    finish(command, file, run)
    same_results(tmp_path / "whole", run)


def test_a_killed_process_leaves_no_lock(command: CommandLine, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", recipe, "--out", run, REPORT, "train.steps=3", die=("update", 1, "after")) == KILLED
    assert command("train", recipe, "--out", run, REPORT) == 2
    assert "already holds a run" in command.output.read_text(encoding="utf-8")
    assert command("train", "--resume", run, "train.steps=4") == 2
    assert "The recipe differs" in command.output.read_text(encoding="utf-8")
    assert command("train", "--resume", run) == 0
    assert [line["step"] for line in lines(run)] == [0, 1, 2, 3, 3]


@pytest.mark.slow
def test_random_kills_of_fresh_processes(
    recipe: Path, whole: tuple[Path, float], command: CommandLine, tmp_path: Path
) -> None:
    def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tokenloom", *map(str, arguments)],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    started = time.monotonic()
    assert start("train", recipe, "--out", tmp_path / "first", REPORT).wait() == 0
    seconds = time.monotonic() - started
    same_results(whole[0], tmp_path / "first")
    run, moments, kills = tmp_path / "run", random.Random(1), 0
    while kills < 20:
        process = start(*resume(recipe, run))
        try:
            # Importing takes most of the time, and nothing can go wrong in it.
            process.wait(seconds * (0.4 + 0.6 * min(moments.random(), moments.random())))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == KILLED
            kills += 1
    finish(command, recipe, run)
    same_results(whole[0], run)
