"""The engine knows no method by name: one file comes or goes, and nothing else changes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenloom import catalog

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tokenloom"
FOLDERS = ("train", "policy", "cli", "rollout")


def literals(text: str) -> Iterator[tuple[int, str]]:
    """Line and value of every string in a program, pieces of f-strings included, docstrings left out."""
    tree = ast.parse(text)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value


def offences(text: str) -> list[tuple[int, str]]:
    """Strings that name a part exactly, or that have the slug of a preset among their words."""
    presets = set(catalog.presets())
    # A temperature is a quantity before it is a method.
    names = (set(catalog.parts()) | set(catalog.methods())) - {"temperature"}
    return [
        (line, value)
        for line, value in literals(text)
        if value in names or presets & set(re.split(r"[^a-z0-9-]+", value.lower()))
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_slug_of_a_method_appears(folder: str) -> None:
    files = sorted((SOURCE / folder).rglob("*.py"))
    assert files
    found = {f"{f.relative_to(SOURCE)}:{line}": value for f in files for line, value in offences(f.read_text("utf-8"))}
    assert found == {}


def test_the_search_finds_one() -> None:
    assert offences('"""grpo is fine in a docstring."""\nname = "grpo"\n') == [(2, "grpo")]
    assert offences('x = f"algorithm=dapo {1}"\n') == [(1, "algorithm=dapo ")]
    assert offences('x = "step"\n') == []
