"""The command as its own process: pipes, signals, start-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.tiny_run import make_tiny_model, tiny_recipe

SOURCE = Path(__file__).resolve().parents[2] / "src"


def start(folder: Path, *arguments: object, **extra: str) -> subprocess.Popen[str]:
    """`python -m tokenloom` in `folder`, its output in pipes."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | extra
    command = [sys.executable, "-m", "tokenloom", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        encoding="utf-8",
        # A shell that runs the tests in its background has them ignore Ctrl-C, which children inherit.
        preexec_fn=None if sys.platform == "win32" else _hears_interrupts,
    )


def _hears_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder, make_tiny_model(folder))
    return folder


def test_training_in_a_pipe_has_no_escapes_and_no_noise(made: Path) -> None:
    process = start(made, "train", "tiny.yaml", "train.steps=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\x1b" not in out + err
    assert err == ""
    assert "step 2/2" in out
    assert (made / "runs" / "tiny-001" / "report.html").is_file()
    assert "python -m tokenloom report runs/tiny-001" in out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows delivers Ctrl-C to a whole console, tests included")
def test_ctrl_c_says_how_to_resume(made: Path) -> None:
    process = start(made, "train", "tiny.yaml", "train.steps=100000", "--out", "stopped")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    # The first checkpoint lies a moment after the first step's line.
    deadline = time.monotonic() + 60
    while not list((made / "stopped" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "python -m tokenloom train --resume stopped" in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows delivers Ctrl-C to a whole console, tests included")
def test_generating_stops_and_goes_on_as_often_as_one_likes(made: Path) -> None:
    (made / "many.txt").write_text("".join(f"{i % 4}+{i // 4 % 4}\n" for i in range(400)), encoding="utf-8")
    asked = ["generate", "tiny-model", "--prompts", "many.txt", "--max-tokens", "80", "--out", "many.jsonl"]
    part = made / "many.jsonl.part"
    held = 1  # a line of settings
    for kind, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(made, *asked)
        deadline = time.monotonic() + 60
        while not (part.exists() and part.read_bytes().count(b"\n") > held) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert ("the same command goes on from" in err) == (kind is signal.SIGINT)
        assert "Traceback" not in err
        held = part.read_bytes().count(b"\n")
        assert not (made / "many.jsonl").exists()
    _, err = start(made, *asked).communicate(timeout=120)
    assert "of 400 responses were there already" in err
    assert (made / "many.jsonl").read_bytes().count(b"\n") == 400


def test_a_reader_of_answers_may_leave(made: Path) -> None:
    (made / "few.txt").write_text("1+1\n" * 200, encoding="utf-8")
    process = start(made, "generate", "tiny-model", "--prompts", "few.txt", "--max-tokens", "80")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "1+1\n"
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_help_is_quick_and_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tokenloom.cli.app as a\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True, timeout=60)


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
    process = start(tmp_path, "--help")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1
