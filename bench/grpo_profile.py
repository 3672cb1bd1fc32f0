"""Where Tokenloom's step spends its time: the ten operations of each shape with the most time of their own, bf16."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.child import Turns
from bench.grpo_step import SHAPES, SMALL, running_trainer, shown
from bench.harness import PEAK, SECONDS, Row, Side, Table, main
from bench.inputs import SMOLLM2
from bench.page import markdown_table, number

TOP = 10


def measure(turns: Turns, **settings: Any) -> None:
    """Steps under PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with running_trainer(**settings) as trainer:
        trainer.step(0)
        for step, _ in enumerate(turns, start=1):
            started = time.perf_counter()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                trainer.step(step)
            seconds = time.perf_counter() - started
            found = sorted(seen.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
            total = sum(e.self_cpu_time_total for e in found)
            top = [{"name": e.key, "share": e.self_cpu_time_total / total, "calls": e.count} for e in found[:TOP]]
            turns.report(seconds=seconds, operations=top)


def rows(quick: bool) -> list[Row]:
    """One profiled step a shape."""
    shapes = {"small": SMALL} if quick else SHAPES
    model = "random-1024" if quick else SMOLLM2
    made = []
    for name, shape in shapes.items():
        work = {"model": model, **shape, "precision": "bf16"}
        made.append(Row(f"{name}: {shown(work)}", (Side("Tokenloom", "bench.grpo_profile:measure", work),), runs=1))
    return made


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """A table of operations for every shape, instead of the usual one."""
    parts = []
    for row in results["rows"]:
        for side in row["sides"]:
            operations = side["measurements"][-1]["operations"]
            lines = [[f"`{o['name']}`", f"{number(100 * o['share'])} %", str(o["calls"])] for o in operations]
            rest = 1 - sum(o["share"] for o in operations)
            table = markdown_table(
                ["operation", "share of time", "calls"], [*lines, ["all others", f"{number(100 * rest)} %", ""]]
            )
            parts.append(f"**{row['label']}** (commit {row['commit']}, {row['date']})\n\n{table}")
    return {"grpo-profile": "\n\n".join(parts)}


TABLE = Table("grpo-profile", "Where a step spends its time", rows, (SECONDS, PEAK), blocks)

if __name__ == "__main__":
    main(TABLE)
