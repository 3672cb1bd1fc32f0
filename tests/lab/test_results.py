"""Averages over seeds and families, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tokenloom.lab.intervals import t_quantile
from tokenloom.lab.results import FIGURES, GRID, OVERALL, summarize


def record(method: str, family: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A cell's record with figures that are easy to average."""
    gradient = {"cosine": 0.9, "bias": 0.25, "noise": 100.0, "snr": 0.01, "scale": 1.0} | changes.get("gradient", {})
    credit = {"correlation": 0.5, "error": 0.8, "mean_correlation": 0.7}
    learning = {
        "samples": [0, 50, 100], "objective": [0.2, 0.6, 0.8], "best": 0.8, "samples_needed": 100, "final": 1.0,
        "entropy_kept": 0.5, "milliseconds": 2.0, "skipped": 0,
    } | changes.get("learning", {})  # fmt: skip
    return {
        "method": method, "family": family, "seed": seed, "kind": changes.get("kind", "table"), "status": "done",
        "budget": {"batches": 4, "samples": 100, "group_size": 8}, "learning": learning,
        "gradient": {k: {"value": v, "half": 0.1} for k, v in gradient.items()},
        "credit": {k: {"value": v, "half": 0.1} for k, v in credit.items()},
    }  # fmt: skip


def test_means_and_intervals_over_seeds() -> None:
    records = [record("a", "x", s, gradient={"cosine": c}) for s, c in ((0, 0.7), (1, 0.9))]
    row = summarize(records)["boards"]["table"]["families"]["x"]["a"]
    half = t_quantile(1) * math.sqrt(0.02) / math.sqrt(2)
    # A cosine ends at 1, its interval too.
    assert row["cosine"] == pytest.approx([0.8, max(0.8 - half, -1), 1.0])
    assert row["credit"] == pytest.approx([0.5, 0.5, 0.5])
    alone = summarize(records[:1])["boards"]["table"]["families"]["x"]["a"]
    assert alone["cosine"] == [0.7, None, None]
    assert set(row) == {f.name for f in FIGURES}


def test_noise_is_averaged_by_its_logarithm_and_bias_by_its_square() -> None:
    records = [
        record("a", "x", s, gradient={"noise": n, "bias": b}) for s, n, b in ((0, 10.0, 0.5), (1, 1000.0, -0.14))
    ]
    row = summarize(records)["boards"]["table"]["families"]["x"]["a"]
    assert row["noise"][0] == pytest.approx(100)
    assert row["bias"][0] == pytest.approx(math.sqrt(0.18))
    negative = [record("a", "x", s, gradient={"bias": -0.1}) for s in (0, 1)]
    assert summarize(negative)["boards"]["table"]["families"]["x"]["a"]["bias"] == [0, 0, 0]


def test_overall_is_the_mean_over_families_and_misses_nothing() -> None:
    records = [record("a", f, s, gradient={"cosine": c}) for f, c in (("x", 0.2), ("y", 0.6)) for s in (0, 1)]
    records += [record("b", "x", 0)]
    board = summarize(records)["boards"]["table"]
    assert list(board["overall"]) == ["a"]
    assert board["overall"]["a"]["cosine"] == pytest.approx([0.4, 0.4, 0.4])
    assert list(board["families"]["x"]) == ["a", "b"]
    lacking = [*records[:3], record("a", "y", 1, gradient={"noise": None})]
    assert summarize(lacking)["boards"]["table"]["overall"]["a"]["noise"] == [None, None, None]
    assert summarize(lacking)["boards"]["table"]["families"]["y"]["a"]["noise"] == [None, None, None]


def test_a_run_that_did_not_arrive_counts_the_whole_budget() -> None:
    records = [record("a", "x", s, learning={"samples_needed": n}) for s, n in ((0, 40), (1, None))]
    board = summarize(records)["boards"]["table"]
    assert board["families"]["x"]["a"]["samples"][0] == 70
    assert board["reached"]["x"]["a"] == board["reached"][OVERALL]["a"] == 0.5


def test_curves_are_interpolated_on_a_common_grid_in_units_of_the_best() -> None:
    records = [
        record("a", "x", 0),
        record("a", "x", 1, learning={"objective": [0.4, 0.4, 0.4], "samples": [0, 64, 128]}),
    ]
    grid, mean, low, high = summarize(records)["boards"]["table"]["curves"]["x"]["a"]
    assert len(grid) == GRID
    assert (grid[0], grid[-1]) == (0, 100)
    at = grid.index(25)
    assert (low[at], high[at]) == (0.5, 0.5)
    assert mean[at] == pytest.approx((0.4 / 0.8 + 0.4 / 0.8) / 2)
    assert high[-1] == 1.0


def test_kinds_of_policy_have_boards_of_their_own() -> None:
    boards = summarize([record("a", "x", 0), record("b", "x", 0, kind="transformer")])["boards"]
    assert {k: list(b["overall"]) for k, b in boards.items()} == {"table": ["a"], "transformer": ["b"]}


def test_what_was_not_run_is_told_once() -> None:
    cell = {"method": "c", "family": "x", "seed": 0, "kind": "table", "status": "not run", "reason": "needs votes"}
    summary = summarize([record("a", "x", 0), cell, cell | {"seed": 1}, cell | {"family": "y"}])
    assert summary["not_run"] == [{"method": "c", "family": "x", "status": "not run", "reason": "needs votes"}]
