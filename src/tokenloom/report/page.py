"""`write_report` and `compare_report`: what the pages say, as one JSON payload; the assets draw it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenloom.report.html import write_page
from tokenloom.report.jsonl import number
from tokenloom.report.read import RunData, read_run
from tokenloom.report.series import MAX_POINTS, all_series, meaning, thinned
from tokenloom.report.summary import duration, final_numbers, recipe_differences, summarize
from tokenloom.report.text import prompt_text, shorten
from tokenloom.report.token_payload import token_payload

MAX_SAMPLES_PER_OUTCOME = 40
MAX_RUNS = 6


def write_report(run: str | Path, out: str | Path | None = None, *, compare: Sequence[str] = ()) -> Path:
    """Write the HTML report of one run folder and return its path (default: `report.html` in the run).

    `compare` names presets to ask about the dumped responses; one that lacks signals is shown with the reason.

    Raises:
        ValueError: when `run` is not a run folder or a preset is unknown. Damaged files never raise: the page says
            what is missing.
    """
    data = read_run(run)
    tokens, blobs = token_payload(data, compare)
    payload = {
        "runs": [_run(data)],
        "charts": _charts([data]),
        "samples": sample_pairs(data),
        "tokens": tokens,
    }
    return write_page(payload, _target(out, data.path / "report.html", "report.html"), blobs)


def compare_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page with the curves of two (up to six) runs overlaid, final numbers and recipe differences.

    Raises:
        ValueError: for fewer than two or more than six runs, or when one is not a run folder.
    """
    if not 2 <= len(runs) <= MAX_RUNS:
        raise ValueError(f"compare_report takes 2 to {MAX_RUNS} run folders, got {len(runs)}")
    data = [read_run(run, max_responses=0) for run in runs]
    payload = {
        "runs": [_run(d) | {"name": name} for d, name in zip(data, _labels(data), strict=True)],
        "charts": _charts(data),
        "finals": [{"key": key, "unit": meaning(key).unit, "values": values} for key, values in final_numbers(data)],
        "differences": [{"key": key, "values": values} for key, values in recipe_differences(data)],
    }
    return write_page(payload, _target(out, Path(out), "compare.html"))


def _target(out: str | Path | None, default: Path, name: str) -> Path:
    target = default if out is None else Path(out)
    return target / name if target.is_dir() else target


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Folder names, or as much of the paths as tells equal names apart."""
    names = [r.name for r in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{i}: {'/'.join(r.path.resolve().parts[-2:])}" for i, r in enumerate(runs, 1)]


def _run(run: RunData) -> dict[str, Any]:
    summary = asdict(summarize(run))
    algorithm = run.info.get("algorithm")
    lines = algorithm.get("description", []) if isinstance(algorithm, dict) else []
    machine = run.info.get("machine")
    versions = run.info.get("versions")
    facts = {k: run.info.get(k) for k in ("version", "seed", "started", "finished")}
    return summary | {
        "name": run.name,
        "time": duration(summary["seconds"]),
        "notes": list(run.notes),
        "recipe": run.recipe_text,
        "description": [str(line) for line in (lines if isinstance(lines, list) else [lines])],
        "facts": _pairs(facts),
        "machine": _pairs(machine if isinstance(machine, dict) else {"machine": machine}),
        "versions": _pairs(versions if isinstance(versions, dict) else {}),
    }


def _pairs(values: dict[str, Any]) -> list[list[str]]:
    return [
        [str(k), shorten(v if isinstance(v, str) else json.dumps(v, default=str), 300)]
        for k, v in values.items()
        if v is not None
    ]


def _charts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    curves = [all_series(run) for run in runs]
    short = [{key: thinned(series) for key, series in found.items()} for found in curves]
    charts = []
    for key in dict.fromkeys(k for found in curves for k in found):
        about = meaning(key)
        charts.append(
            {
                "key": key,
                "group": about.group,
                "unit": about.unit,
                "about": about.about,
                "series": [
                    {"run": i, "steps": found[key].steps, "values": found[key].values}
                    for i, found in enumerate(short)
                    if key in found
                ],
                "thinned": any(len(f[key].steps) > MAX_POINTS for f in curves if key in f),
            }
        )
    return charts


def sample_pairs(run: RunData) -> dict[str, Any]:
    """The first answer to each held-out prompt at the first and at the last step on record, by outcome.

    `counts` covers all prompts; `pairs` holds at most `MAX_SAMPLES_PER_OUTCOME` of each outcome.
    """
    steps = sorted({int(s) for line in run.samples if (s := number(line.get("step"))) is not None})
    if not steps:
        return {"pairs": [], "counts": {}, "before": None, "after": None}
    first, last = steps[0], steps[-1]
    by_prompt: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in run.samples:
        step = number(line.get("step"))
        if step is not None and int(step) in (first, last):
            by_prompt[prompt_text(line.get("prompt"))].setdefault(int(step), line)
    pairs: list[dict[str, Any]] = []
    counts: dict[str, int] = defaultdict(int)
    for prompt, answers in by_prompt.items():
        before, after = answers.get(first), answers.get(last)
        outcome = _outcome(before, after)
        counts[outcome] += 1
        if counts[outcome] <= MAX_SAMPLES_PER_OUTCOME:
            expected = next((a["expected"] for a in answers.values() if a.get("expected") is not None), None)
            pairs.append(
                {
                    "prompt": prompt,
                    "expected": None if expected is None else shorten(str(expected), 500),
                    "outcome": outcome,
                    "before": _answer(before) if first != last else None,
                    "after": _answer(after),
                }
            )
    return {
        "pairs": pairs,
        "counts": counts,
        "before": first if first != last else None,
        "after": last,
        "cap": MAX_SAMPLES_PER_OUTCOME,
    }


def _outcome(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None or before is after:
        only = after or before or {}
        return "right" if only.get("correct") else "wrong"
    was, now = bool(before.get("correct")), bool(after.get("correct"))
    return {(False, True): "learned", (True, False): "lost", (True, True): "kept", (False, False): "missed"}[was, now]


def _answer(line: dict[str, Any] | None) -> dict[str, Any] | None:
    if line is None:
        return None
    answer = line.get("answer")
    return {
        "response": shorten(str(line.get("response", ""))),
        "answer": None if answer is None else shorten(str(answer), 500),
        "reward": number(line.get("reward")),
        "correct": bool(line.get("correct")),
    }
