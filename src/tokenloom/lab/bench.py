"""A whole run of the laboratory: which methods, families and seeds; its folder; its summary and page.

OUT/cells/*.json    one record for each cell, found again by a later run
OUT/results.json    the summary, and every record
OUT/index.html      the leaderboard
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tokenloom
from tokenloom.catalog import presets
from tokenloom.hints import suggest
from tokenloom.lab import leaderboard
from tokenloom.lab.cells import FULL, QUICK, Cell, Kind, algorithm_of, kind_of
from tokenloom.lab.families import families
from tokenloom.lab.oracle import NAME
from tokenloom.lab.results import FIGURES, summarize
from tokenloom.lab.runner import Report, run


@dataclass(frozen=True)
class Plan:
    """What to measure. Empty `methods` means every preset and the oracle, empty `families` all of them.

    `policy` "auto" takes a table wherever a method's signals allow it; "transformer" runs everything on one.
    """

    methods: Sequence[str] = ()
    families: Sequence[str] = ()
    seeds: int = 5
    quick: bool = False
    policy: Literal["auto", "transformer"] = "auto"

    def cells(self) -> list[Cell]:
        """Every combination.

        Raises:
            ValueError: for an unknown method or family.
        """
        chosen = list(self.families) or list(families())
        for name in chosen:
            if name not in families():
                raise ValueError(f"unknown task family {name!r}{suggest(name, families())}")
        budgets = QUICK if self.quick else FULL
        cells = []
        for method, kind in self._kinds():
            cells += [Cell(method, f, s, kind, budgets[kind]) for f in chosen for s in range(self.seeds)]
        return cells

    def _kinds(self) -> list[tuple[str, Kind]]:
        """Methods with the policies that they run on. The oracle goes wherever others go."""
        named = list(dict.fromkeys(self.methods)) or [NAME, *presets()]
        known = {method: algorithm_of(method) for method in named}
        if self.policy == "transformer":
            return [(method, "transformer") for method in known]
        kinds: list[tuple[str, Kind]] = [(m, kind_of(a)) for m, a in known.items() if m != NAME]
        if NAME in known:
            everywhere: list[Kind] = sorted({kind for _, kind in kinds}) or ["table"]
            kinds = [*((NAME, kind) for kind in everywhere), *kinds]
        return kinds


def run_lab(plan: Plan, out: Path, *, workers: int | None = None, report: Report | None = None) -> dict[str, Any]:
    """Measure, write the results into `out`, and return the summary (see `results.summarize`).

    Raises:
        ValueError: as `Plan.cells` does.
    """
    cells = plan.cells()
    records = run(cells, out / "cells", workers=workers or os.cpu_count() or 1, report=report)
    summary = summarize(records)
    about = {"tokenloom": tokenloom.__version__, "plan": asdict(plan)}
    results = {"about": about, "summary": summary, "records": records}
    part = out / "results.json.part"
    part.write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
    os.replace(part, out / "results.json")
    leaderboard.write(_payload(plan, records, summary), out / "index.html")
    return summary


def redraw(folder: Path, page: Path | None = None) -> Path:
    """Draw the leaderboard of a laboratory folder anew from its `results.json`, into `page` or its index.html.

    Raises:
        ValueError: when the folder has no readable results.
    """
    try:
        held = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        plan, records, summary = Plan(**held["about"]["plan"]), held["records"], held["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no results of this laboratory ({error!r}); run tokenloom lab again") from None
    return leaderboard.write(_payload(plan, records, summary), page or folder / "index.html")


def _payload(plan: Plan, records: Sequence[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    algorithms = {name: algorithm_of(name) for name in sorted({r["method"] for r in records})}
    budgets = {
        kind: f"Tokenloom {tokenloom.__version__}. {b.batches} batches for credit and gradient, {b.samples} responses "
        f"for learning, groups of {b.group_size}."
        for kind, b in (QUICK if plan.quick else FULL).items()
    }
    return {
        "about": {"seeds": plan.seeds, "budgets": budgets},
        "figures": [{"name": f.name, "label": f.label, "better": f.better, "about": f.about} for f in FIGURES],
        "claims": {name: families()[name].claim for name in {r["family"] for r in records}},
        "compositions": {name: a.describe() for name, a in algorithms.items()},
        "summary": summary,
    }
