"""`tokenloom lab` from the outside, on a few cells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tokenloom.cli.lab import lab
from tokenloom.lab import bench
from tokenloom.lab.cells import Budget, Cell
from tokenloom.lab.families import families
from tokenloom.lab.oracle import NAME


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("lab")(lab)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "QUICK", {"table": Budget(3, 64, 4), "transformer": Budget(2, 32, 4)})

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--workers", "1"])

    return run


def test_a_quick_look_prints_a_table_and_writes_page_and_numbers(invoke, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = invoke("--quick", "--methods", "rloo, grpo", "--families", "critical-token,spurious")
    assert result.exit_code == 0, result.output
    assert "rloo" in result.output
    assert "Means over 2 families, 1 seed" in result.output
    out = tmp_path / "runs" / "lab"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["about"]["plan"]["methods"] == ["rloo", "grpo"]
    assert len(results["records"]) == 4
    assert set(results["summary"]["boards"]["table"]["overall"]) == {"rloo", "grpo"}
    assert (out / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(list((out / "cells").glob("*.json"))) == 4


def test_a_folder_is_drawn_anew_from_its_results(invoke, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert invoke("--quick", "--methods", "rloo", "--families", "spurious", "--out", "x").exit_code == 0
    page = (tmp_path / "x" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "x" / "index.html").unlink()
    assert bench.redraw(tmp_path / "x") == tmp_path / "x" / "index.html"
    assert bench.redraw(tmp_path / "x", tmp_path / "other.html").read_text(encoding="utf-8") == page
    (tmp_path / "x" / "results.json").write_text('{"about": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="run tokenloom lab again"):
        bench.redraw(tmp_path / "x")


def test_json_goes_to_standard_output_alone(invoke) -> None:  # type: ignore[no-untyped-def]
    result = invoke("--quick", "--methods", "rloo", "--families", "conflict", "--seeds", "2", "--json", "--out", "x")
    assert result.exit_code == 0
    row = json.loads(result.stdout)["boards"]["table"]["families"]["conflict"]["rloo"]
    assert row["cosine"][1] is not None


def test_the_list_teaches_the_families(invoke) -> None:  # type: ignore[no-untyped-def]
    result = invoke("--list")
    assert result.exit_code == 0
    for family in families().values():
        assert family.name in result.output
        assert family.claim in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--methods", "grpoo"], "unknown algorithm 'grpoo'; did you mean 'grpo'"),
     (["--families", "conflct"], "unknown task family 'conflct'; did you mean 'conflict'"),
     (["--methods", "rloo:x"], "rloo")],
)  # fmt: skip
def test_mistakes_name_the_remedy_before_work_starts(
    invoke, tmp_path: Path, arguments: list[str], message: str
) -> None:  # type: ignore[no-untyped-def]
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_shown_and_sets_the_exit_code(invoke, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fails(cell: Cell) -> dict[str, object]:
        return {"method": cell.method, "family": cell.family, "seed": 0, "kind": "table", "status": "failed",
                "reason": "KeyError: 'x'", "budget": {"samples": 1}}  # fmt: skip

    monkeypatch.setattr("tokenloom.lab.runner.run_cell", fails)
    result = invoke("--quick", "--methods", "rloo", "--families", "conflict")
    assert result.exit_code == 1
    assert "rloo, failed: KeyError: 'x'" in result.output


def test_a_plan_holds_every_preset_and_the_yardstick_where_others_are() -> None:
    from tokenloom.catalog import presets

    cells = bench.Plan(seeds=1).cells()
    assert {c.method for c in cells} == {NAME, *presets()}
    assert {c.family for c in cells} == set(families())
    kinds = {c.kind for c in cells}
    assert {c.kind for c in cells if c.method == NAME} == kinds
    assert {c.kind for c in bench.Plan(["rloo"], policy="transformer").cells()} == {"transformer"}
    assert len(bench.Plan([NAME], ["conflict"], 3).cells()) == 3


def test_importing_the_laboratory_needs_pytorch_alone() -> None:
    code = (
        "import sys, tokenloom.lab; "
        "print([m for m in ('transformers', 'pydantic', 'rich', 'typer', 'yaml', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
