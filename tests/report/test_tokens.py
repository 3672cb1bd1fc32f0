"""Which responses a page embeds, and in what shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tokenloom.report import tokens
from tokenloom.report.tokens import read_tokens, spread


def _write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "tokens.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _line(step: int, row: int, group: int, reward: float, n: int = 3) -> dict[str, Any]:
    return {"step": step, "row": row, "group": group, "reward": reward, "ids": [7] * n, "pieces": ["a"] * n}


def test_spread() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 5) == [1, 2]
    assert spread([1, 2, 3], 1) == [3]


def test_budget_is_shared_by_steps_and_mixed_groups_come_first(tmp_path: Path) -> None:
    lines = [_line(s, r, r // 2, float(r == 4)) for s in (1, 2, 3) for r in range(6)]
    dump = read_tokens(_write(tmp_path, lines), [], max_responses=6)
    assert (dump.total, dump.steps) == (18, 3)
    # Group 2 (rows 4 and 5) is the only one whose rewards differ.
    assert [(r.step, r.row) for r in dump.rows] == [(s, r) for s in (1, 2, 3) for r in (4, 5)]


def test_more_steps_than_responses(tmp_path: Path) -> None:
    lines = [_line(s, r, 0, 0.0) for s in range(1, 101) for r in range(2)]
    dump = read_tokens(_write(tmp_path, lines), [], max_responses=5)
    assert [r.step for r in dump.rows] == [1, 26, 51, 75, 100]
    assert read_tokens(tmp_path / "tokens.jsonl", [], max_responses=0).rows == ()


def test_token_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 10)
    dump = read_tokens(_write(tmp_path, [_line(1, r, r, 0.0, 4) for r in range(9)]), [])
    assert [r.row for r in dump.rows] == [0, 1]
    # One response beyond the budget is still shown.
    dump = read_tokens(_write(tmp_path, [_line(1, 0, 0, 0.0, 40)]), [])
    assert len(dump.rows) == 1


def test_rows_written_again_count_once(tmp_path: Path) -> None:
    dump = read_tokens(_write(tmp_path, [_line(1, 0, 0, 0.0), _line(1, 1, 0, 0.0), _line(1, 0, 0, 5.0)]), [])
    assert dump.total == 2
    assert [(r.row, r.reward) for r in dump.rows] == [(0, 5.0), (1, 0.0)]


def test_one_step_alone(tmp_path: Path) -> None:
    path = _write(tmp_path, [_line(s, r, 0, 0.0) for s in (1, 4, 9) for r in range(2)])
    assert [(r.step, r.row) for r in read_tokens(path, [], step=4).rows] == [(4, 0), (4, 1)]
    assert {r.step for r in read_tokens(path, [], step=-1).rows} == {9}
    missing = read_tokens(path, [], step=5)
    assert (missing.rows, missing.step_numbers) == ((), (1, 4, 9))


def test_mismatch_of_trainer_and_sampler(tmp_path: Path) -> None:
    """Ratios 2 and 1/2 (an unsampled token and one that is none left out): ESS = (2.5^2 / (2 * 4.25))."""
    line = _line(1, 0, 0, 0.0, 4) | {"mask": [1, 1, 0, 1]}
    line |= {"quantities": {"log_ratio": [math.log(2), -math.log(2), 5.0, None]}}
    (size, ess), = read_tokens(_write(tmp_path, [line, line]), []).mismatch.values()  # fmt: skip
    assert size == pytest.approx(math.log(2), abs=1e-12)
    assert ess == pytest.approx(2.5**2 / (2 * 4.25), abs=1e-12)


def test_probability_and_the_folder_of_the_batch(tmp_path: Path) -> None:
    line = _line(1, 0, 0, 0.0, 2) | {"quantities": {"logprob": [math.log(0.25), None]}, "stored": "tokens/step-000001"}
    escaping = _line(1, 1, 0, 0.0) | {"stored": "tokens/../../secret"}
    first, second = read_tokens(_write(tmp_path, [line, escaping]), []).rows
    assert list(first.quantities) == ["probability", "logprob"]
    # Log-probs are held in single precision.
    assert first.quantities["probability"][0] == pytest.approx(0.25, rel=1e-6)
    assert math.isnan(first.quantities["probability"][1])
    assert (first.stored, second.stored) == ("tokens/step-000001", "")


def test_uneven_lengths_are_filled(tmp_path: Path) -> None:
    line = {"step": 1, "ids": [5, 6, 7], "pieces": ["a"], "mask": [0]}
    line |= {"quantities": {"entropy": [0.5, float("nan"), "x", 9.0], "odd": 3}}
    (row,) = read_tokens(_write(tmp_path, [line]), []).rows
    assert row.pieces == ["a", "<6>", "<7>"]
    assert row.mask == [False, True, True]
    assert list(row.quantities) == ["entropy"]
    assert str(list(row.quantities["entropy"])) == "[0.5, nan, nan]"
    assert (row.row, row.group, row.reward, row.answer) == (0, None, None, None)


def test_long_responses_and_pieces_are_cut(tmp_path: Path) -> None:
    n = tokens.MAX_TOKENS_PER_RESPONSE + 7
    line = _line(1, 0, 0, 1.0, n) | {"quantities": {"entropy": [1.0] * n}}
    line["pieces"][0] = "y" * 1000
    (row,) = read_tokens(_write(tmp_path, [line]), []).rows
    assert row.omitted == 7
    assert len(row.pieces) == len(row.ids) == len(row.quantities["entropy"]) == tokens.MAX_TOKENS_PER_RESPONSE
    assert row.pieces[0] == "y" * 200 + "… [+800 characters]"
