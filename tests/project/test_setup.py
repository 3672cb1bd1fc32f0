"""The set-up program reinstalls when, and only when, what an install depends on has changed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_env(tmp_path: Path) -> Any:
    """The program, pointed at a project of its own."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path
    module.CONSTRAINTS = tmp_path / "cpu.txt"
    module.CONSTRAINTS.write_text("torch==2.13.0\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return module


def test_settings_of_tools_do_not_reinstall(setup_env: Any) -> None:
    before = setup_env.digest(None, "3.11")
    with (setup_env.ROOT / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.something]\nkey = 1\n")
    assert setup_env.digest(None, "3.11") == before


@pytest.mark.parametrize("change", ["dependency", "constraint", "torch", "python"])
def test_what_an_install_depends_on_reinstalls(setup_env: Any, change: str) -> None:
    before = setup_env.digest(None, "3.11")
    if change == "dependency":
        project = setup_env.ROOT / "pyproject.toml"
        text = project.read_text(encoding="utf-8")
        project.write_text(text.replace('["torch>=2.6"]', '["torch>=2.7"]'), encoding="utf-8")
    elif change == "constraint":
        setup_env.CONSTRAINTS.write_text("torch==2.14.0\n", encoding="utf-8")
    torch = "torch>=2.9" if change == "torch" else None
    assert setup_env.digest(torch, "3.12" if change == "python" else "3.11") != before


def test_a_larger_install_covers_a_smaller_one(setup_env: Any, tmp_path: Path) -> None:
    stamp = {"digest": "d", "wanted": ["+model", "dev", "train"]}
    (tmp_path / "tokenloom-x.stamp").write_text(json.dumps(stamp), encoding="utf-8")
    assert setup_env.installed(tmp_path, {"train"}, "d")
    assert not setup_env.installed(tmp_path, {"train", "docs"}, "d")
    assert not setup_env.installed(tmp_path, {"train"}, "other")


def test_a_torn_stamp_counts_as_nothing(setup_env: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenloom-x.stamp").write_text("", encoding="utf-8")
    assert not setup_env.installed(tmp_path, set(), "d")


def test_the_build_of_torch_is_remembered(setup_env: Any, tmp_path: Path) -> None:
    assert setup_env.chosen_torch(tmp_path, "") is None
    (tmp_path / "tokenloom-torch.txt").write_text("torch>=2.9", encoding="utf-8")
    assert setup_env.chosen_torch(tmp_path, "") == "torch>=2.9"
    assert setup_env.chosen_torch(tmp_path, "torch==2.10") == "torch==2.10"
