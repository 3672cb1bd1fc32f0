"""`import tokenloom`, the catalog and an algorithm need PyTorch and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("torch_only.py")


def closure(distribution: str) -> set[str]:
    """Normalized names of a distribution and of everything that it requires outright."""
    seen: set[str] = set()
    waiting = [distribution]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        seen.add(name)
        waiting += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in needed if "extra ==" not in r]
    return seen


def run(python: Path | str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), "-W", "ignore", str(PROGRAM), *arguments],
        capture_output=True, text=True, env=os.environ | environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(result: dict[str, Any]) -> None:
    assert {"algorithm", "batch", "catalog", "masked", "signals", "testing"} <= set(result["core"])
    assert result["methods"] >= 18
    # One right answer of four: the right one is pushed up, the wrong ones down by a third of that.
    (up, _), *down = result["coefficients"]
    assert up > 0
    assert [row[0] / up for row in down] == pytest.approx([-1 / 3] * 3, rel=1e-3)


def test_with_everything_but_torch_blocked() -> None:
    allowed = closure("torch") | {"tokenloom"}
    blocked = {
        top
        for top, owners in packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & allowed
    }
    assert {"transformers", "numpy", "pydantic", "yaml", "typer", "rich", "safetensors"} <= blocked
    result = run(sys.executable, *sorted(blocked), PYTHONPATH=str(ROOT / "src"))
    check(result)
    assert not blocked & set(result["loaded"])


@pytest.mark.slow
def test_in_a_fresh_environment(tmp_path: Path) -> None:
    """The set-up program makes one without extras; running it again does nothing."""
    folder = tmp_path / "env"
    setup = [sys.executable, str(ROOT / "scripts" / "setup_env.py"), "--venv", str(folder)]
    first = subprocess.run(setup, capture_output=True, text=True, timeout=900, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "ready" in first.stdout
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environment = {"PYTHONPATH": ""}
    names = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    assert not {"transformers", "numpy", "pydantic"} & {row["name"].lower() for row in json.loads(names.stdout)}
    check(run(python, **environment))
    again = subprocess.run(setup, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout == ""
