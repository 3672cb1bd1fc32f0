"""Curves, headlines and differences: the numbers behind both views."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report.make_run import make_run
from tokenloom.report import read_run
from tokenloom.report.series import Series, all_series, meaning, thinned
from tokenloom.report.summary import (
    duration,
    final_numbers,
    recipe_differences,
    summarize,
    value_text,
    wilson,
)


def test_headline(tmp_path: Path) -> None:
    summary = summarize(read_run(make_run(tmp_path / "run", steps=10)))
    assert (summary.model, summary.task, summary.algorithm) == (
        "SmolLM2-135M-Instruct",
        "reasoning_gym:chain_sum",
        "grpo",
    )
    assert (summary.steps, summary.planned, summary.status) == (10, 10, "finished")
    assert summary.seconds == pytest.approx(116, abs=8)
    assert summary.greedy is not None
    assert (summary.greedy.before, summary.greedy.before_step, summary.greedy.after_step) == (0.31, 0, 10)
    assert summary.sampled is not None
    assert (summary.sampled.problems, summary.sampled.samples) == (100, 16)
    assert summary.sampled.interval is None


def test_headline_of_a_stopped_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    (folder / "run.json").write_text('{"started": "2026-01-01T00:00:00", "finished": null}', encoding="utf-8")
    (folder / "timing.jsonl").unlink()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    summary = summarize(read_run(folder))
    assert summary.status.startswith("unfinished")
    assert (summary.steps, summary.planned, summary.seconds) == (1, 3, None)
    assert summary.greedy is not None
    assert summary.greedy.before is None
    # Names come from the recipe where run.json does not have them.
    assert (summary.model, summary.algorithm) == ("smollm2-135m-instruct", "grpo")


def test_best_evaluation_is_the_first_of_equals(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    evals = [{"step": s, "kind": "eval", "greedy": g} for s, g in ((0, 0.1), (5, 0.8), (9, 0.8), (10, 0.7))]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, evals)), encoding="utf-8")
    greedy = summarize(read_run(folder)).greedy
    assert greedy is not None
    assert (greedy.before, greedy.after, greedy.best, greedy.best_step) == (0.1, 0.7, 0.8, 5)


def test_wilson_by_hand() -> None:
    # 74 of 100: center (0.74 + 1.9208 / 100) / (1 + 3.8415 / 100), half width 0.0848.
    low, high = wilson(74, 100)
    assert (round(low, 3), round(high, 3)) == (0.646, 0.816)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_all_numeric_metrics_become_curves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    lines = [
        {"step": 1, "kind": "train", "reward": 1, "flag": True, "text": "x", "list": [1], "late": None},
        {"step": 2, "kind": "train", "reward": None, "reward_parts": {"format": 0.5}, "late": None},
        {"step": 3, "kind": "train", "reward": float("inf"), "huge": 10**400},
        {"step": 3, "kind": "eval", "greedy": 0.5, "samples": 4, "problems": 9, "pass@4": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for name in ("timing.jsonl", "tokens.jsonl"):
        (folder / name).unlink()
    curves = all_series(read_run(folder))
    assert list(curves) == ["eval/greedy", "eval/pass@4", "reward", "reward_parts/format", "flag"]
    assert curves["reward"] == Series([1, 2, 3], [1.0, None, None])
    assert meaning("eval/pass@4").unit == "%"
    assert (meaning("surrogate/clip_fraction").group, meaning("surrogate/clip_fraction").unit) == (
        "surrogate",
        "%",
    )
    assert meaning("novel").group == "Other"


def test_thinning_keeps_spikes_and_gaps() -> None:
    values: list[float | None] = [0.0] * 10_000
    values[4321] = 99.0
    values[6000:6500] = [None] * 500
    thin = thinned(Series(list(range(10_000)), values), 200)
    assert len(thin.steps) <= 210
    assert (thin.steps[0], thin.steps[-1]) == (0, 9999)
    assert thin.values[thin.steps.index(4321)] == 99.0
    assert any(v is None for s, v in zip(thin.steps, thin.values, strict=True) if 6000 <= s < 6500)
    short = Series([1, 2], [0.5, None])
    assert thinned(short) is short


def test_final_numbers(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, steps=20, seed=i)) for i, name in enumerate("ab")]
    finals = dict(final_numbers(runs))
    rewards = [[m["reward"] for m in run.train] for run in runs]
    assert finals["reward"] == [pytest.approx(sum(r[-2:]) / 2) for r in rewards]
    assert finals["eval/greedy"] == [run.evals[-1]["greedy"] for run in runs]


def test_recipe_differences(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", steps=2)
    b = make_run(tmp_path / "b", steps=2, algorithm="dapo")
    text = (b / "recipe.yaml").read_text(encoding="utf-8")
    (b / "recipe.yaml").write_text(text.replace("  dtype: bf16\n", "  lora: {rank: 8}\n"), encoding="utf-8")
    assert recipe_differences([read_run(a), read_run(b)]) == [
        ("model.dtype", ["bf16", "—"]),
        ("algorithm", ["grpo", "dapo"]),
        ("model.lora.rank", ["—", "8"]),
    ]


def test_recipes_that_refer_to_themselves_end(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", steps=1), make_run(tmp_path / "b", steps=1)
    (a / "recipe.yaml").write_text("x: &x {y: *x, z: [*x, 1], n: 1}\nmodel: &m [*m]\n", encoding="utf-8")
    bomb = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else '1'}]\n" for i in range(12))
    (b / "recipe.yaml").write_text(bomb, encoding="utf-8")
    runs = [read_run(a), read_run(b)]
    assert ("x.n", ["1", "—"]) in recipe_differences(runs)
    assert summarize(runs[0]).model == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (0.34, "0.3 s"), (59.4, "59 s"), (252, "4 min 12 s"), (3780, "1 h 03 min")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_value_text() -> None:
    assert value_text(None) == "—"
    assert value_text(0.745, "%") == "74.5 %"
    assert value_text(12345.678) == "12,345.7"
    assert value_text(0.000012, "nats") == "1.2e-05 nats"
