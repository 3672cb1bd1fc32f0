"""Every preset of the catalog runs in the laboratory, or says what it lacks; no list of them is kept here."""

from __future__ import annotations

import math

import pytest

from tokenloom.catalog import presets
from tokenloom.lab.cells import Budget, Cell, algorithm_of, kind_of, run_cell

KINDS = {slug: kind_of(algorithm_of(slug)) for slug in presets()}


@pytest.mark.parametrize("slug", sorted(KINDS))
def test_a_preset_runs_and_its_figures_are_numbers(slug: str) -> None:
    kind = KINDS[slug]
    budget = Budget(batches=3, samples=64) if kind == "table" else Budget(batches=2, samples=32)
    record = run_cell(Cell(slug, "short-right", 0, kind, budget))
    assert record["status"] == "done", record["reason"]
    assert all(0 <= j <= 1 for j in record["learning"]["objective"])
    assert record["learning"]["skipped"] == 0
    for figures in (record["gradient"], record["credit"], record["advantages"]):
        for name, figure in figures.items():
            assert figure["value"] is None or math.isfinite(figure["value"]), name
