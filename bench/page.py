"""From stored results to Markdown between the markers of docs/benchmarks.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.harness import ROOT, Metric, Table
from bench.spreads import Spread, advantage, spread

PAGE = ROOT / "docs" / "benchmarks.md"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a vertical bar in a cell is escaped.

    Raises:
        ValueError: for a line that is not as wide as the header.
    """
    rendered = [" | ".join(header), " | ".join("---" for _ in header)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a line of {len(line)} cells under a header of {len(header)}: {line}")
        rendered.append(" | ".join(cell.replace("|", "\\|") for cell in line))
    return "\n".join(f"| {line} |" for line in rendered)


def number(value: float, digits: int = 3) -> str:
    """Significant digits, never in exponent form."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


def shown(value: Spread, unit: str = "") -> str:
    """`median unit (low–high)`; without the extremes when they read the same."""
    middle, low, high = number(value.median), number(value.low), number(value.high)
    name = f" {unit}" if unit else ""
    return f"{middle}{name}" if low == high else f"{middle}{name} ({low}–{high})"


def table_block(table: Table, results: Mapping[str, Any]) -> str:
    """The table of stored results: one line a side, and how many times better ours is than each peer."""
    header = ["configuration", "side", *(m.title for m in table.metrics)]
    compared = [m for m in table.metrics if m.compare]
    header += [f"Tokenloom better by: {m.title}" for m in compared] + ["target"]
    lines: list[list[str]] = []
    for row in results["rows"]:
        ours: Mapping[str, Any] = row["sides"][0] if row["sides"] else {}
        for side in row["sides"]:
            about = f" ({side['about']})" if side.get("about") else ""
            cells = [row["label"] if side is ours else "", side["name"] + about]
            cells += [_cell(m, side) for m in table.metrics]
            cells += ["" if side is ours else _advantage(m, ours, side) for m in compared]
            lines.append([*cells, _targets(row, side, ours, table.metrics)])
        for reason in [*row["skipped"], *([row["failed"].splitlines()[0]] if row["failed"] else [])]:
            lines.append(["" if row["sides"] else row["label"], f"not measured: {reason}", *[""] * (len(header) - 2)])
    measured = any(row["sides"] for row in results["rows"])
    return markdown_table(header, lines) + (f"\n\n{_caption(results)}" if measured else "")


def write(blocks: Mapping[str, str], text: str) -> str:
    """`text` with the content between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` replaced.

    Raises:
        ValueError: naming a block whose markers are not in the text exactly once.
    """
    for name, block in blocks.items():
        content = f"\n{block}\n\n"
        pattern = re.compile(rf"(<!-- bench:{re.escape(name)} -->\n).*?(<!-- /bench:{re.escape(name)} -->)", re.DOTALL)
        pieces = pattern.split(text)
        if len(pieces) != 4:
            raise ValueError(
                f"the page has {len(pieces) // 3} places for {name!r}: add the lines "
                f"<!-- bench:{name} --> and <!-- /bench:{name} --> where the table belongs, once"
            )
        before, opening, closing, after = pieces
        text = f"{before}{opening}{content}{closing}{after}"
    return text


def summary(metric: Metric, measurements: Sequence[Mapping[str, Any]]) -> str:
    """A metric's median in words, for the terminal."""
    return f"{metric.title} {_cell(metric, {'measurements': measurements}) or 'unknown'}"


def _values(metric: Metric, side: Mapping[str, Any]) -> dict[int, float]:
    """The metric by round, in its unit."""
    return {r: m[metric.key] * metric.factor for r, m in enumerate(side["measurements"]) if metric.key in m}


def _cell(metric: Metric, side: Mapping[str, Any]) -> str:
    values = _values(metric, side)
    return shown(spread(list(values.values())), metric.unit) if values else ""


def _advantage(metric: Metric, ours: Mapping[str, Any], peer: Mapping[str, Any]) -> str:
    mine, theirs = _values(metric, ours), _values(metric, peer)
    if not (mine.keys() & theirs.keys()):
        return ""
    value = advantage(mine, theirs, lower_is_better=metric.better == "lower")
    return f"**{number(value.median)}×** ({number(value.low)}–{number(value.high)})"


def _targets(
    row: Mapping[str, Any], side: Mapping[str, Any], ours: Mapping[str, Any], metrics: Sequence[Metric]
) -> str:
    known = {m.key: m for m in metrics}
    texts = []
    for target in row["targets"]:
        metric = known[target["metric"]]
        if target["peer"] == side["name"]:
            mine, theirs = _values(metric, ours), _values(metric, side)
            value = advantage(mine, theirs, lower_is_better=metric.better == "lower").median
            texts.append(_verdict(f"{metric.title} ≥ {number(target['at_least'])}×", value >= target["at_least"]))
        elif target["peer"] is None and side is ours:
            value = spread(list(_values(metric, ours).values())).median
            limit = f"{number(target['at_most'])} {metric.unit}".strip()
            texts.append(_verdict(f"{metric.title} ≤ {limit}", value <= target["at_most"]))
    return "<br>".join(texts)


def _verdict(text: str, met: bool) -> str:
    return f"{text}: {'met' if met else '**missed**'}"


def _caption(results: Mapping[str, Any]) -> str:
    """Machine, versions, dates and rounds of the table, from the results alone."""
    host, rows = results["machine"], results["rows"]
    sides = [s for r in rows for s in r["sides"]]
    versions = {k: v for s in sides for k, v in s.get("versions", {}).items()}
    threads = sorted({s["threads"] for s in sides if "threads" in s})
    rounds = sorted({len(s["measurements"]) for s in sides})
    counted = " or ".join(map(str, rounds)) + (" round" if rounds == [1] else " rounds, sides alternating")
    parts = [
        f"Median (smallest–largest) of {counted}",
        f"{host['processor']}, {host['cores']} cores, {host['memory_gb']} GB, {host['system']}",
        f"{' or '.join(map(str, threads))} threads",
        ", ".join(f"{k} {v}" for k, v in sorted(versions.items())),
        f"commit {', '.join(sorted({r['commit'] for r in rows}))}, {', '.join(sorted({r['date'] for r in rows}))}",
    ]
    return f"*{'; '.join(parts)}.*"
