"""`make bench`: measure every table against its peers and rewrite the generated parts of docs/benchmarks.md.

python -m bench.run                           all tables
python -m bench.run --only grpo-step rollout  some of them
python -m bench.run --long                    also the rows that take long
python -m bench.run --resume                  keep stored rows that were measured with the same settings
python -m bench.run --quick                   a smoke run with small sizes; nothing is stored
python -m bench.run --render                  measure nothing, rewrite the page from the stored results
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import page, store
from bench.harness import Row, Side, SideFailed, Table, alternate, missing

TABLES = ("grpo-step", "grpo-profile", "trl-settings", "memory", "scaling", "rollout", "logprobs",
          "logprobs-gpu", "step", "speculative", "constraints", "processors")  # fmt: skip
"""All tables, in the order of the page; the module of `grpo-step` is `bench.grpo_step`."""

console = Console()


def measure(table: Table, folder: Path, *, quick: bool = False, resume: bool = False, long: bool = False) -> None:
    """Measure a table row by row, storing after each; what is not measured now stays as it was stored."""
    here = store.machine()
    old = store.load(table.name, folder)
    stored = {r["key"]: r for r in old["rows"]} if old and old["machine"] == here else {}
    found: dict[str, dict[str, Any]] = {}
    wanted = table.rows(quick)
    for row in wanted:
        key = store.row_key(row)
        before = stored.get(key)
        if row.long and not long:
            state = "kept" if before else "left out (--long measures it)"
        elif resume and before and not before["failed"] and not before["skipped"]:
            state = "kept"
        else:
            record = _measure_row(table, row, runs=1 if quick else row.runs)
            # A run without one of the peers must not replace a comparison with it.
            if not before or len(record["sides"]) >= len(before["sides"]):
                found[key] = record
            state = ""
        if state:
            console.print(f"[dim]{table.name}: {row.label}: {state}[/dim]")
        keys = [store.row_key(r) for r in wanted]
        rows = [found.get(k) or stored.get(k) for k in keys]
        store.save({"table": table.name, "machine": here, "rows": [r for r in rows if r]}, folder)


def _measure_row(table: Table, row: Row, runs: int) -> dict[str, Any]:
    reasons = {side.name: missing(side) for side in row.sides}
    sides = tuple(s for s in row.sides if not reasons[s.name])
    skipped = [r for r in reasons.values() if r]
    for reason in skipped:
        console.print(f"[yellow]{table.name}: {row.label}: left out: {reason}[/yellow]")
    if row.sides[0] not in sides or (len(row.sides) > 1 and len(sides) == 1):
        console.print(f"[yellow]{table.name}: {row.label}: not measured, nothing is left to compare with[/yellow]")
        return store.row_record(row, {}, skipped, "")
    started = time.perf_counter()
    with console.status(f"{table.name}: {row.label}: loading") as status:

        def report(number: int, side: Side) -> None:
            status.update(f"{table.name}: {row.label}: round {number + 1} of {runs}, {side.name}")

        try:
            measured = alternate(sides, runs, fresh=row.fresh, report=report)
        except SideFailed as error:
            console.print(f"{table.name}: {row.label}: {error}", style="red", markup=False, highlight=False)
            return store.row_record(row, {}, skipped, str(error))
    record = store.row_record(row, measured, skipped, "")
    medians = "; ".join(
        f"{name} " + ", ".join(page.summary(m, found.measurements) for m in table.metrics)
        for name, found in measured.items()
    )
    console.print(f"{table.name}: {row.label}: {medians} [dim]({time.perf_counter() - started:.0f} s)[/dim]")
    return record


def rendered(tables: Sequence[Table], text: str) -> str:
    """The page's `text` with the generated parts of those tables that there are stored results of."""
    blocks: dict[str, str] = {}
    for table in tables:
        blocks |= _blocks(table, store.RESULTS)
    return page.write(blocks, text)


def render(tables: Sequence[Table]) -> None:
    """Rewrite the page and its drawings."""
    for table in tables:
        results = store.load(table.name)
        if results is not None and table.draw is not None:
            table.draw(results)
    page.PAGE.write_text(rendered(tables, page.PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def table_named(name: str) -> Table:
    """The table of that name."""
    table: Table = importlib.import_module(f"bench.{name.replace('-', '_')}").TABLE
    return table


def _blocks(table: Table, folder: Path) -> dict[str, str]:
    results = store.load(table.name, folder)
    if results is None:
        return {}
    return {table.name: page.table_block(table, results), **(table.blocks(results) if table.blocks else {})}


def run(names: Sequence[str] = TABLES) -> None:
    """The command line over the tables of these names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TABLE", choices=names, help="these tables")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, printed and not stored")
    parser.add_argument("--long", action="store_true", help="also the rows that take long")
    parser.add_argument("--resume", action="store_true", help="keep rows already measured with the same settings")
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the stored results")
    options = parser.parse_args()
    chosen = [table_named(name) for name in names if not options.only or name in options.only]
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            for table in chosen:
                measure(table, Path(folder), quick=True, long=True)
                for block in _blocks(table, Path(folder)).values():
                    print(block)
        return
    for table in chosen if not options.render else ():
        measure(table, store.RESULTS, resume=options.resume, long=options.long)
    render(chosen)


if __name__ == "__main__":
    run()
