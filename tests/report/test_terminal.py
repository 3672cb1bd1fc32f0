"""The terminal view: what it says, and that it stays safe and plain where it must."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from report.make_run import make_run
from tokenloom.report.series import Series
from tokenloom.report.terminal import print_compare, print_summary, sparkline


def _console(encoding: str = "utf-8", force_terminal: bool = False) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(file=file, width=120, force_terminal=force_terminal or None), raw


def test_summary(tmp_path: Path) -> None:
    console, raw = _console()
    print_summary(make_run(tmp_path / "run", steps=10), console)
    text = raw.getvalue().decode()
    assert "SmolLM2-135M-Instruct · reasoning_gym:chain_sum · grpo" in text
    assert "10 of 10 steps in" in text
    assert "31.0 % → 74.0 %  (+43.0 points)" in text
    assert "surrogate/clip_fraction" in text
    assert "newly right" in text
    assert "\x1b" not in text


def test_hostile_text_cannot_drive_the_terminal(tmp_path: Path) -> None:
    console, raw = _console(force_terminal=True)
    print_summary(make_run(tmp_path / "run", steps=10, hostile=True), console)
    text = raw.getvalue().decode()
    assert "\\u001b" in text
    # Rich's own styles only: no red from the model's text, no bidi override, no NUL.
    assert "\x1b[31m\\ud800" not in text
    assert not {"\u202e", "\x00", "\u200b", "\u2028"} & set(text)


def test_no_color_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=4)
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored, with_color = _console(force_terminal=True)
    print_summary(run, colored)
    monkeypatch.setenv("NO_COLOR", "1")
    plain, without = _console(force_terminal=True)
    print_summary(run, plain)
    assert b"\x1b[36m" in with_color.getvalue()
    assert b"\x1b[36m" not in without.getvalue()


def test_compare(tmp_path: Path) -> None:
    console, raw = _console()
    a = make_run(tmp_path / "a", steps=10)
    b = make_run(tmp_path / "b", steps=12, seed=1, algorithm="dapo")
    (b / "timing.jsonl").unlink()
    print_compare(a, b, console)
    lines = raw.getvalue().decode().splitlines()
    greedy = next(line for line in lines if line.startswith("eval/greedy"))
    assert greedy.split()[2:5] == ["74.0", "75.0", "+1.0"]
    assert next(line for line in lines if line.startswith("algorithm")).split() == [
        "algorithm",
        "grpo",
        "dapo",
    ]
    assert "timing.jsonl is missing" in lines[-1]
    assert next(line for line in lines if line.startswith("timing/seconds")).split()[3:5] == ["—", "—"]


def test_sparkline() -> None:
    console, _ = _console()
    series = Series(list(range(8)), [float(i) for i in range(8)])
    assert sparkline(series, console).plain == "▁▂▃▄▅▆▇█"
    assert sparkline(series, console, 4).plain == "▁▃▆█"
    assert sparkline(Series([1, 2, 3], [1.0, None, 1.0]), console).plain == "▁ ▁"
    narrow, _ = _console(encoding="ascii")
    assert sparkline(series, narrow).plain.isascii()


def test_old_code_pages_do_not_fail(tmp_path: Path) -> None:
    console, raw = _console(encoding="ascii")
    print_summary(make_run(tmp_path / "run", steps=4), console)
    assert b"31.0 %" in raw.getvalue()


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenloom train"):
        print_summary(tmp_path)
