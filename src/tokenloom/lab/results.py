"""From cells to a leaderboard: each figure over seeds, by family and over all families, with 95 % intervals.

Over seeds: mean of the figure (of its logarithm for noise and signal-to-noise, of the squared bias) and Student's t.
Over families: the same per seed on the mean over families, so that the interval says how much another seed matters,
not how much families differ. A figure that one seed or one family lacks has no mean over them: what is
left out would flatter the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tokenloom.lab.intervals import finite, over_seeds

GRID = 41
"""Points of an averaged learning curve."""

OVERALL = "all families"


def _same(x: float) -> float:
    return x


def _log(x: float) -> float:
    return math.log(x) if x > 0 else math.nan


def _root(x: float) -> float:
    return math.sqrt(max(x, 0.0))


def _clip(x: float) -> float:
    """A correlation corrected for noise may lie beyond 1 by its own."""
    return min(max(x, -1.0), 1.0)


@dataclass(frozen=True)
class Figure:
    """One column: where a record holds it, on which scale it is averaged, which end is good, what it means."""

    name: str
    label: str
    path: tuple[str, ...]
    better: str
    about: str
    forward: Callable[[float], float] = _same
    inverse: Callable[[float], float] = _same

    def of(self, record: Mapping[str, Any]) -> float:
        """The record's value on the averaging scale; NaN where there is none."""
        value: Any = record
        for step in self.path:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return math.nan
        return self.forward(float(value))


FIGURES = (
    Figure("credit", "credit", ("credit", "correlation", "value"), "high",
           "correlation of a token's coefficient with its exact advantage, token by token"),
    Figure("mean_credit", "mean credit", ("credit", "mean_correlation", "value"), "high",
           "the same for the average coefficient of a (state, token): what is left when noise averages out",
           _same, _clip),
    Figure("credit_error", "credit error", ("credit", "error", "value"), "low",
           "root mean square error of the coefficients at their best scale, over that of giving no credit"),
    Figure("cosine", "cosine", ("gradient", "cosine", "value"), "high",
           "between the mean gradient estimate and the exact gradient", _same, _clip),
    Figure("bias", "bias", ("gradient", "bias", "value"), "low",
           "length of what the mean estimate has beside the exact gradient, over its part along it", _same, _root),
    Figure("noise", "noise", ("gradient", "noise", "value"), "low",
           "variance of the estimate per sampled token, in squared lengths of its part along the exact gradient",
           _log, math.exp),
    Figure("snr", "signal to noise", ("gradient", "snr", "value"), "high",
           "squared length of the mean estimate over its variance per sampled token", _log, math.exp),
    Figure("samples", "samples to 95 %", ("learning", "samples_needed"), "low",
           "responses drawn until J reached 95 % of the best; the whole budget where it did not"),
    Figure("final", "final J", ("learning", "final"), "high", "J at the end of the budget, over the best J"),
    Figure("entropy", "entropy kept", ("learning", "entropy_kept"), "high",
           "entropy per token at the end over that at the beginning"),
    Figure("milliseconds", "ms per step", ("learning", "milliseconds"), "low",
           "median time of plan, signals, loss and gradient of a step, sampling apart"),
)  # fmt: skip


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The leaderboard as JSON data.

    `boards` holds one for each kind of policy, since budgets and tasks differ between them: `overall` and `families`
    with {method: {figure: [value, low, high]}}, `reached` with the share of runs that reached 95 %, `curves` with J
    over samples. `not_run` says what could not be run, and why.
    """
    problems: dict[tuple[str, str], dict[str, str]] = {}
    done: dict[str, dict[str, dict[str, list[Mapping[str, Any]]]]] = {}
    for record in records:
        if record["status"] == "done":
            board = done.setdefault(record["kind"], {})
            board.setdefault(record["family"], {}).setdefault(record["method"], []).append(record)
        else:
            names = {n: record[n] for n in ("method", "family", "status", "reason")}
            problems.setdefault((record["method"], record["reason"]), names)
    return {
        "boards": {kind: _board(done[kind]) for kind in sorted(done)},
        "not_run": list(problems.values()),
    }


def _board(families: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    everyone = sorted({m for found in families.values() for m in found})
    complete = [m for m in everyone if all(m in found for found in families.values())]
    whole = {m: [found[m] for found in families.values()] for m in complete}
    return {
        "families": {f: {m: _row(records) for m, records in found.items()} for f, found in families.items()},
        "overall": {m: _overall(groups) for m, groups in whole.items()},
        "reached": {f: {m: _reached(records) for m, records in found.items()} for f, found in families.items()}
        | {OVERALL: {m: _reached([r for group in groups for r in group]) for m, groups in whole.items()}},
        "curves": {f: {m: _curve(records) for m, records in found.items()} for f, found in families.items()},
    }


def _row(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    return {figure.name: _entry(figure, [_value(figure, r) for r in records]) for figure in FIGURES}


def _overall(families: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[float | None]]:
    row = {}
    seeds = sorted({r["seed"] for records in families for r in records})
    for figure in FIGURES:
        by_seed = [[_value(figure, r) for records in families for r in records if r["seed"] == s] for s in seeds]
        # NaN anywhere is NaN in the mean: a family left out would flatter the method.
        row[figure.name] = _entry(figure, [fmean(values) for values in by_seed])
    return row


def _value(figure: Figure, record: Mapping[str, Any]) -> float:
    value = figure.of(record)
    if figure.name == "samples" and math.isnan(value):
        return float(record["budget"]["samples"])
    return value


def _entry(figure: Figure, values: Sequence[float]) -> list[float | None]:
    """[value, low, high]; the interval comes from the averaging scale, and a single seed has none."""
    found = over_seeds(values)
    ends = (found.value, found.value - found.half, found.value + found.half)
    return [finite(figure.inverse(v)) if math.isfinite(v) else None for v in ends]


def _reached(records: Sequence[Mapping[str, Any]]) -> float:
    return fmean(r["learning"]["samples_needed"] is not None for r in records)


def _curve(records: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[samples], [mean J over the best J], [lowest seed], [highest seed] on an even grid."""
    budget = records[0]["budget"]["samples"]
    grid = [budget * i / (GRID - 1) for i in range(GRID)]
    curves = [_interpolate(r["learning"], grid) for r in records]
    columns = list(zip(*curves, strict=True))
    rows = ([fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns])
    return [grid, *([round(v, 4) for v in row] for row in rows)]


def _interpolate(learning: Mapping[str, Any], grid: Sequence[float]) -> list[float]:
    samples, objective, best = learning["samples"], learning["objective"], learning["best"]
    found, i = [], 0
    for at in grid:
        while i + 1 < len(samples) - 1 and samples[i + 1] < at:
            i += 1
        share = min((at - samples[i]) / (samples[i + 1] - samples[i]), 1.0)
        found.append((objective[i] + share * (objective[i + 1] - objective[i])) / best)
    return found
