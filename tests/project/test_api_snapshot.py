"""The checked-in public API is the one in the source, and the comparison sees what matters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_snapshot", ROOT / "scripts" / "api_snapshot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_up_to_date(api: ModuleType) -> None:
    assert api.SNAPSHOT.read_text(encoding="utf-8") == api.snapshot(), "run `make update`, and say so in CHANGELOG.md"


def package(folder: Path, text: str) -> Path:
    (folder / "tokenloom").mkdir(parents=True)
    (folder / "tokenloom" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "tokenloom" / "part.py").write_text(text, encoding="utf-8")
    return folder


BASE = "import os\ndef rule(x: int, *, eps: float = 1e-6) -> int:\n    return x\ndef _private(): ...\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [("x: int", "y: int"), ("1e-6", "1e-4"), ("*, ", ""), ("-> int", "-> float"), ("rule", "role")],
)
def test_it_sees(api: ModuleType, tmp_path: Path, old: str, new: str) -> None:
    before = api.snapshot(package(tmp_path / "a", BASE))
    after = api.snapshot(package(tmp_path / "b", BASE.replace(old, new)))
    assert before != after


def test_it_overlooks_imports_and_private_names(api: ModuleType, tmp_path: Path) -> None:
    text = api.snapshot(package(tmp_path, BASE))
    assert "rule(x: int, *, eps: float = 1e-06)" in text or "rule(x: int, *, eps: float = 1e-6)" in text
    assert "os" not in text.replace("Tokenloom", "").split("tokenloom.part")[1]
    assert "_private" not in text
