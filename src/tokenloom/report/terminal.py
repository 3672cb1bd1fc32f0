"""A run, or two, on the terminal: headline, curves as sparklines, what changed in the answers.

Rich drops color when `NO_COLOR` is set or the output is a pipe; what models wrote is printed with
escapes and control characters made visible, never as markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenloom.report.page import sample_pairs
from tokenloom.report.read import RunData, read_run
from tokenloom.report.series import Series, all_series, meaning
from tokenloom.report.summary import (
    Change,
    Summary,
    duration,
    final_numbers,
    recipe_differences,
    summarize,
    value_text,
)
from tokenloom.report.text import printable

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def print_summary(run: str | Path, console: Console | None = None) -> None:
    """Print what a run did: before and after, metrics with their curves, a few changed answers, notes.

    Raises:
        ValueError: when `run` is not a run folder.
    """
    out = console or Console()
    data = read_run(run, max_responses=0)
    with _lossy(out):
        _summary(out, data)


def print_compare(run_a: str | Path, run_b: str | Path, console: Console | None = None) -> None:
    """Print two runs side by side: final numbers, their difference and curves, how the recipes differ.

    Raises:
        ValueError: when one of them is not a run folder.
    """
    out = console or Console()
    runs = [read_run(run, max_responses=0) for run in (run_a, run_b)]
    with _lossy(out):
        _comparison(out, runs)


def sparkline(series: Series, console: Console, width: int = 20) -> Text:
    """The curve in at most `width` characters, each the mean of its bucket; a space where no number is."""
    values = series.values
    bars = BARS if (console.encoding or "").lower().startswith("utf") else ASCII_BARS
    count = min(width, len(values))
    buckets = [
        [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if v is not None]
        for i in range(count)
    ]
    means = [sum(b) / len(b) if b else None for b in buckets]
    finite = [m for m in means if m is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span = high - low
    marks = (
        " " if m is None else bars[round((m - low) / span * (len(bars) - 1))] if span > 0 else bars[0] for m in means
    )
    return Text("".join(marks), style="cyan")


def _summary(out: Console, data: RunData) -> None:
    _headline(out, data, summarize(data))
    curves, finals = all_series(data), dict(final_numbers([data]))
    if curves:
        wide = out.width >= 100
        table = _table("metric", "first", "final", *(("lowest", "highest") if wide else ()), "curve")
        for key, series in curves.items():
            finite = series.finite()
            numbers = [finite[0], finals[key][0], *((min(finite), max(finite)) if wide else ())]
            table.add_row(_metric(key), *(_plain(key, v) for v in numbers), sparkline(series, out))
        out.print(table)
        out.print(Text("final: the last evaluation; in training the mean of the last tenth of steps", "dim"))
    _changed_answers(out, data)
    _notes(out, [data])


def _comparison(out: Console, runs: Sequence[RunData]) -> None:
    for label, run in zip("AB", runs, strict=True):
        _headline(out, run, summarize(run), label)
    curves = [all_series(run) for run in runs]
    wide = out.width >= 100
    table = _table("metric", "A", "B", "B - A", *(("curve A", "curve B") if wide else ()))
    for key, (a, b) in final_numbers(runs):
        delta = None if a is None or b is None else b - a
        points = f"{100 * (delta or 0):+.1f}" if meaning(key).unit == "%" else f"{delta or 0:+.4g}"
        lines = [sparkline(found[key], out, 14) if key in found else Text("—") for found in curves]
        row = (_plain(key, a), _plain(key, b), "—" if delta is None else points)
        table.add_row(_metric(key), *row, *(lines if wide else ()))
    out.print(table)
    differences = recipe_differences(runs)
    if differences:
        settings = _table("setting", "A", "B", numeric=False)
        for key, values in differences:
            settings.add_row(Text(printable(key, 60)), *(Text(v) for v in values))
        out.print(settings)
    else:
        out.print(Text("The recipes do not differ.", "dim"))
    _notes(out, runs)


@contextmanager
def _lossy(out: Console) -> Iterator[None]:
    """Print "?" for what an old code page lacks, rather than fail."""
    file = out.file
    if not isinstance(file, TextIOWrapper):
        yield
        return
    errors = file.errors
    file.reconfigure(errors="replace")
    try:
        yield
    finally:
        file.reconfigure(errors=errors)


def _headline(out: Console, run: RunData, summary: Summary, label: str = "") -> None:
    title = Text(f"{label}  " if label else "", style="bold cyan")
    title.append(printable(run.name), style="bold")
    out.print()
    out.print(title)
    what = [x for x in (summary.model, summary.task, summary.algorithm) if x]
    if what:
        out.print(Text("  " + " · ".join(what)))
    steps = f"{summary.steps} of {summary.planned}" if summary.planned else f"{summary.steps}"
    seed = f" · seed {printable(summary.seed)}" if summary.seed else ""
    line = f"  {steps} steps in {duration(summary.seconds)}{seed} · {summary.status}"
    out.print(Text(line, style="" if summary.status == "finished" else "yellow"))
    for change in (summary.greedy, summary.sampled):
        if change is not None:
            out.print(_change(change, out))


def _change(change: Change, out: Console) -> Text:
    arrow = "→" if (out.encoding or "").lower().startswith("utf") else "->"
    text = Text(f"  held-out {change.label:<8}")
    if change.before is not None:
        text.append(f"{100 * change.before:5.1f} % {arrow} ")
    text.append(f"{100 * change.after:.1f} %", style="bold")
    if change.before is not None:
        delta = 100 * (change.after - change.before)
        text.append(f"  ({delta:+.1f} points)", style="green" if delta > 0 else "red" if delta < 0 else "")
    if change.problems:
        each = f", {change.samples} samples each" if change.samples else ""
        text.append(f"  {change.problems} problems{each}", style="dim")
    return text


def _changed_answers(out: Console, run: RunData, count: int = 3) -> None:
    pairs = sample_pairs(run)
    if not pairs["pairs"] or pairs["before"] is None:
        return
    names = {"learned": "newly right", "lost": "newly wrong", "kept": "still right", "missed": "still wrong"}
    tally = ", ".join(f"{pairs['counts'].get(k, 0)} {name}" for k, name in names.items())
    out.print(Text(f"Held-out answers, step {pairs['before']} and step {pairs['after']}: {tally}"))
    shown = [p for p in pairs["pairs"] if p["outcome"] in ("learned", "lost")][:count]
    if shown:
        table = _table("prompt", "expected", "before", "after", numeric=False)
        for pair in shown:
            # The end of a prompt is where the question usually is.
            cells = [printable(pair["prompt"][-120:]), printable(pair["expected"] or "—")]
            cells += [printable(pair[k]["response"], 80) if pair[k] else "—" for k in ("before", "after")]
            table.add_row(*map(Text, cells))
        out.print(table)


def _notes(out: Console, runs: Sequence[RunData]) -> None:
    for run in runs:
        for note in run.notes:
            out.print(Text(f"note: {printable(run.name)}: {printable(note, 400)}", style="yellow"))


def _metric(key: str) -> Text:
    text, unit = Text(printable(key, 40)), meaning(key).unit
    return text.append(f" ({unit})", style="dim") if unit else text


def _plain(key: str, value: float | None) -> str:
    """The value without its unit, which stands beside the metric's name."""
    unit = meaning(key).unit
    return value_text(value, unit if unit == "%" else "").removesuffix(" %")


def _table(first: str, *others: str, numeric: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold")
    for name in others:
        right = numeric and not name.startswith("curve")
        table.add_column(name, justify="right" if right else "left", no_wrap=numeric, overflow="fold")
    return table
