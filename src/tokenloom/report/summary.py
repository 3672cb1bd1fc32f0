"""The few numbers that say how a run went: shared by the HTML page and the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenloom.report.jsonl import number
from tokenloom.report.read import RunData
from tokenloom.report.series import Series, all_series, meaning
from tokenloom.report.text import printable

MAX_SETTINGS = 2_000
MAX_DEPTH = 12


@dataclass(frozen=True)
class Change:
    """A held-out accuracy before and after training, fractions in [0, 1].

    `before` is the first evaluation, `after` the last; `before` is None when only one exists.
    `interval` is the 95 % Wilson interval of `after` (greedy only, where problems are independent).
    """

    label: str
    before: float | None
    after: float
    before_step: int
    after_step: int
    best: float
    best_step: int
    problems: int | None
    samples: int | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """Headline of a run. `seconds` is the time of the steps on record, None when unknown."""

    model: str
    task: str
    algorithm: str
    seed: str
    status: str
    steps: int
    planned: int | None
    seconds: float | None
    tokens_per_second: float | None
    greedy: Change | None
    sampled: Change | None


def summarize(run: RunData) -> Summary:
    """Headline of `run`; every part may be unknown ("" or None)."""
    train = run.recipe.get("train")
    planned = number(train.get("steps")) if isinstance(train, dict) else None
    steps = int(run.train[-1]["step"]) if run.train else 0
    durations = [v for line in run.timing if (v := number(line.get("seconds"))) is not None]
    speeds = [v for line in run.timing if (v := number(line.get("tokens_per_second"))) is not None]
    return Summary(
        model=_name(run.info.get("model") or run.recipe.get("model")),
        task=_name(run.info.get("task") or run.recipe.get("task")),
        algorithm=_name(run.info.get("algorithm") or run.recipe.get("algorithm")),
        seed="" if run.info.get("seed") is None else str(run.info["seed"]),
        status=_status(run, steps, planned),
        steps=steps,
        planned=None if planned is None else int(planned),
        seconds=sum(durations) if durations else _wall(run.info),
        tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
        greedy=_change(run, "greedy"),
        sampled=_change(run, "sampled"),
    )


def final_numbers(runs: Sequence[RunData]) -> list[tuple[str, list[float | None]]]:
    """(key, one final value per run) for every metric that any run has.

    Final means the last evaluation for `eval/…`, otherwise the mean of the last tenth of the steps.
    """
    curves = [all_series(run) for run in runs]
    keys = dict.fromkeys(key for found in curves for key in found)
    return [(key, [_final(key, found.get(key)) for found in curves]) for key in keys]


def recipe_differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(dotted key, one text per run, "—" where absent) for every setting that is not the same in all."""
    settings = [dict(_leaves(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    rows = [(key, [found.get(key, "—") for found in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def duration(seconds: float | None) -> str:
    """`8 s`, `4 min 12 s` or `1 h 03 min`; "unknown" for None."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def value_text(value: float | None, unit: str = "") -> str:
    """A metric's value for people: fractions in percent, four significant digits otherwise, "—" for None."""
    if value is None:
        return "—"
    if unit == "%":
        return f"{100 * value:.1f} %"
    text = f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion of `n` independent trials."""
    z = 1.959964
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _change(run: RunData, key: str) -> Change | None:
    points = [(int(e["step"]), v, e) for e in run.evals if (v := number(e.get(key))) is not None]
    if not points:
        return None
    (first_step, first, _), (last_step, last, line) = points[0], points[-1]
    best, best_step = max((v, -s) for s, v, _ in points)
    problems, samples = number(line.get("problems")), number(line.get("samples"))
    independent = key == "greedy" and problems is not None and problems >= 1 and 0 <= last <= 1
    return Change(
        label=key,
        before=first if len(points) > 1 else None,
        after=last,
        before_step=first_step,
        after_step=last_step,
        best=best,
        best_step=-best_step,
        problems=None if problems is None else int(problems),
        samples=int(samples) if key == "sampled" and samples is not None else None,
        interval=wilson(last * int(problems), int(problems)) if independent and problems else None,
    )


def _final(key: str, series: Series | None) -> float | None:
    if series is None:
        return None
    finite = series.finite()
    return (finite[-1] if finite else None) if meaning(key).group == "Held-out" else series.tail()[0]


def _status(run: RunData, steps: int, planned: float | None) -> str:
    if run.info.get("finished"):
        return "finished"
    if not run.train and not run.evals:
        return "no step on record"
    if planned is not None and steps >= planned:
        return "all steps done, not marked as finished"
    return "unfinished: still running, stopped or crashed"


def _wall(info: dict[str, Any]) -> float | None:
    started, finished = _moment(info.get("started")), _moment(info.get("finished"))
    return finished - started if started is not None and finished is not None and finished >= started else None


def _moment(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    return None if isinstance(value, bool) else number(value)


def _name(value: Any) -> str:
    if isinstance(value, dict):
        named = next((value[k] for k in ("name", "preset", "path", "slug", "kind") if value.get(k)), None)
        value = ", ".join(map(str, value)) if named is None else named
    return "" if value is None or isinstance(value, list) else printable(str(value), 120)


def _leaves(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    # Depth and count are bounded: YAML anchors can make a small file endless.
    stack: list[tuple[str, Any, int]] = [("", settings, 0)]
    given = 0
    while stack and given < MAX_SETTINGS:
        name, item, level = stack.pop()
        nested = isinstance(item, list) and any(isinstance(v, dict | list) for v in item)
        if item and (nested or isinstance(item, dict)):
            if level < MAX_DEPTH:
                children = item.items() if isinstance(item, dict) else enumerate(item)
                stack += [(f"{name}.{k}" if name else str(k), v, level + 1) for k, v in reversed(list(children))]
        elif name:
            given += 1
            yield name, printable(item if isinstance(item, str) else json.dumps(item, default=str), 120)
