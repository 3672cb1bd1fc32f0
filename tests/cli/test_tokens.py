"""`tokenloom tokens` and `tokenloom report`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.calling import call
from report.make_batch import store_batches
from report.make_run import make_run
from tokenloom.lab import bench


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_batches(make_run(tmp_path_factory.mktemp("cli") / "run", steps=3, algorithm="dapo"))


def test_tokens(run: Path) -> None:
    result = call("tokens", run, "--quantity", "coefficient", "--compare", "reinforce, dapo", "--step", "2")
    assert result.exit_code == 0
    assert "step 2 · prompt" in result.output
    for name in ("as trained", "reinforce", "dapo"):
        assert f"tokens · {name}" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "9"], "no token dump of step 9; dumped: 1, 2, 3"),
        (["--compare", "ppo-gae"], "needs old_values, values"),
        (["--compare", "dappo"], "did you mean"),
    ],
)
def test_what_cannot_be_shown_is_said(run: Path, options: list[str], says: str) -> None:
    result = call("tokens", run, *options)
    assert result.exit_code != 0
    assert says in result.output


def test_report_with_other_presets(run: Path, tmp_path: Path) -> None:
    result = call("report", run, "--out", tmp_path / "page.html", "--compare", "reinforce,ppo-gae")
    assert result.exit_code == 0
    assert f"report: {tmp_path / 'page.html'}" in result.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'data-blob="1/coefficient"' in page
    assert "it needs old_values, values, which this run did not store" in page


def test_a_lab_folder_gives_its_leaderboard(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    summary = {"boards": {}, "not_run": []}
    held = {"about": {"plan": vars(bench.Plan())}, "records": [], "summary": summary}
    (tmp_path / "results.json").write_text(json.dumps(held), encoding="utf-8")
    result = call("report", tmp_path)
    assert result.exit_code == 0
    assert f"leaderboard: {tmp_path / 'index.html'}" in result.output
    assert "<html" in (tmp_path / "index.html").read_text(encoding="utf-8")
    result = call("report", tmp_path, "--compare", "dapo")
    assert result.exit_code == 2
    assert "compares its methods already" in result.output
