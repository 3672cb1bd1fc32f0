"""The benchmarks' own logic: alternation in separate processes, medians and spreads, the page, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import page, run, store
from bench.harness import PEAK, SECONDS, Metric, Row, Side, SideFailed, Table, Target, alternate, missing, order
from bench.spreads import Spread, advantage, spread

SIDES = """
import os, time

def logged(turns, *, name, log, load=0.0, seconds=1.0, size=0):
    def write(what):
        with open(log, "a") as file:
            file.write(f"{what} {name}\\n")
    time.sleep(load)
    write("ready")
    for _ in turns:
        print("noise on standard output")
        held = bytearray(size)
        write("turn")
        turns.report(seconds=seconds, process=os.getpid())

def broken(turns):
    raise ValueError("there is no such weight")

def dies_at_the_second_turn(turns):
    for number, _ in enumerate(turns):
        if number:
            os._exit(7)
        turns.report(seconds=1.0)
"""


@pytest.fixture
def side(tmp_path: Path) -> Any:
    """Makes sides of `SIDES`; the log of what they did is tmp_path/log."""
    (tmp_path / "bench_sides.py").write_text(SIDES, encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path)}

    def make(name: str, function: str = "logged", requires: tuple[str, ...] = (), **settings: Any) -> Side:
        if function == "logged":
            settings |= {"name": name, "log": str(tmp_path / "log")}
        return Side(name, f"bench_sides:{function}", settings, requires, "get it there", environment=environment)

    return make


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return tmp_path / "results"


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text(encoding="utf-8").splitlines()


# -- numbers


def test_a_spread_is_median_smallest_and_largest() -> None:
    assert spread([4.0, 1.0, 9.0, 2.0]) == Spread(3.0, 1.0, 9.0)
    for bad in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            spread(bad)


def test_an_advantage_is_the_ratio_of_medians_with_the_extremes_of_the_rounds() -> None:
    ours, peer = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 3.0, 1: 8.0, 2: 4.0}
    assert advantage(ours, peer, lower_is_better=True) == Spread(2.0, 1.0, 4.0)
    assert advantage(ours, peer, lower_is_better=False) == Spread(0.5, 0.25, 1.0)
    # A round that only one side has cannot be compared, nor counted in one median alone.
    assert advantage(ours | {3: 100.0}, peer, lower_is_better=True) == Spread(2.0, 1.0, 4.0)
    with pytest.raises(ValueError, match="no round"):
        advantage({0: 1.0}, {1: 1.0}, lower_is_better=True)


def test_a_target_names_a_peer_or_a_limit() -> None:
    for wrong in ({}, {"peer": "TRL"}, {"at_least": 3.0}, {"peer": "TRL", "at_least": 3.0, "at_most": 1.0}):
        with pytest.raises(ValueError, match="either"):
            Target("seconds", **wrong)


# -- processes


def test_the_order_is_reversed_every_round() -> None:
    a, b = Side("A", "m:f"), Side("B", "m:f")
    assert [(r, s.name) for r, s in order((a, b), 3)] == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B")]


def test_no_side_loads_while_another_is_measured(side: Any, tmp_path: Path) -> None:
    found = alternate((side("A"), side("B", load=0.3, seconds=2.0)), 2)
    assert log(tmp_path) == ["ready A", "ready B", "turn A", "turn B", "turn B", "turn A"]
    assert [m["seconds"] for m in found["B"].measurements] == [2.0, 2.0]
    assert found["A"].facts["threads"] >= 1
    assert {m["process"] for m in found["A"].measurements}.isdisjoint(m["process"] for m in found["B"].measurements)
    assert len({m["process"] for m in found["A"].measurements}) == 1


def test_a_fresh_row_starts_every_measurement_anew(side: Any, tmp_path: Path) -> None:
    found = alternate((side("A"), side("B")), 2, fresh=True)
    assert log(tmp_path) == [f"{what} {name}" for name in "ABBA" for what in ("ready", "turn")]
    assert len({m["process"] for m in found["A"].measurements}) == 2


def test_peak_memory_is_the_sides_own(side: Any) -> None:
    held = bytearray(os.urandom(1)) * 300_000_000  # what a parent holds must not count for its children
    found = alternate((side("small"), side("large", size=150_000_000)), 1)
    small, large = (found[name].measurements[0]["peak_rss"] for name in ("small", "large"))
    assert len(held) > 2 * small
    assert 140_000_000 < large - small < 200_000_000


def test_a_side_that_fails_says_why(side: Any) -> None:
    with pytest.raises(SideFailed, match=r"B ended with code 1: ValueError: there is no such weight"):
        alternate((side("A"), side("B", "broken")), 1)
    with pytest.raises(SideFailed, match="B ended with code 7"):
        alternate((side("B", "dies_at_the_second_turn"),), 2)


def test_two_sides_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        alternate((Side("A", "m:f"), Side("A", "m:g")), 1)


def test_a_missing_peer_is_named_with_its_remedy(side: Any) -> None:
    assert missing(side("A", requires=("pytest",))) == ""
    assert missing(side("B", requires=("pytest", "no-such-peer"))) == "B: no-such-peer not installed; get it there"
    gone = Side("C", "m:f", python="/no/such/python", install="get it there")
    assert missing(gone) == "C: there is no interpreter /no/such/python; get it there"


# -- runs


def table(*rows: Row) -> Table:
    return Table("t", "T", lambda quick: list(rows), (SECONDS,))


def test_a_comparison_without_its_peer_is_refused_and_keeps_what_was_measured(side: Any, stored: Path) -> None:
    whole = Row("r", (side("Tokenloom"), side("TRL")), runs=1)
    run.measure(table(whole), stored)
    before = store.load("t", stored)
    assert before is not None
    assert [s["name"] for s in before["rows"][0]["sides"]] == ["Tokenloom", "TRL"]

    without = Row("r", (side("Tokenloom"), side("TRL", requires=("no-such-peer",))), runs=1)
    run.measure(table(without), stored)
    assert store.load("t", stored) == before
    run.measure(table(without), stored / "new")
    found = store.load("t", stored / "new")
    assert found is not None
    assert found["rows"][0]["sides"] == []
    assert "no-such-peer not installed" in page.table_block(table(without), found)


def test_resuming_keeps_rows_of_the_same_settings(side: Any, stored: Path, tmp_path: Path) -> None:
    one, two = Row("one", (side("A"),), runs=1), Row("two", (side("A", seconds=3.0),), runs=1)
    run.measure(table(one), stored)
    run.measure(table(one, two), stored, resume=True)
    assert log(tmp_path).count("turn A") == 2
    run.measure(table(one, Row("two", (side("A", seconds=4.0),), runs=1)), stored, resume=True)
    assert log(tmp_path).count("turn A") == 3
    found = store.load("t", stored)
    assert found is not None
    assert [r["sides"][0]["measurements"][0]["seconds"] for r in found["rows"]] == [1.0, 4.0]


def test_long_rows_are_measured_on_demand_and_kept(side: Any, stored: Path, tmp_path: Path) -> None:
    rows = (Row("long", (side("A"),), runs=1, long=True), Row("short", (side("A"),), runs=1))
    run.measure(table(*rows), stored)
    run.measure(table(*rows), stored, long=True)
    run.measure(table(*rows), stored)
    assert log(tmp_path).count("turn A") == 4
    found = store.load("t", stored)
    assert found is not None
    assert [r["label"] for r in found["rows"]] == ["long", "short"]


def test_a_failing_side_is_stored_as_failed_and_measured_again(side: Any, stored: Path) -> None:
    run.measure(table(Row("r", (side("A"), side("B", "broken")), runs=1)), stored)
    found = store.load("t", stored)
    assert found is not None
    assert "no such weight" in found["rows"][0]["failed"]
    assert "not measured: B ended with code 1: ValueError" in page.table_block(table(), found)


# -- the page


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- bench:a -->\nold\n<!-- /bench:a -->\nbetween\n<!-- bench:a-b -->\n<!-- /bench:a-b -->\nafter\n"
    once = page.write({"a": r"| \1 |"}, text)
    assert once == text.replace("old\n", "\n| \\1 |\n\n")
    assert page.write({"a": r"| \1 |"}, once) == once
    for broken in ("", text + text):
        with pytest.raises(ValueError, match="places for 'a'"):
            page.write({"a": ""}, broken)


def test_a_markdown_table_escapes_and_counts() -> None:
    assert page.markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    with pytest.raises(ValueError, match="1 cells"):
        page.markdown_table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (9.0, "9"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (1.5e-6, "0.0000015"),
        (100.0, "100"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert page.number(value) == text


def test_a_table_shows_medians_ratios_and_verdicts() -> None:
    def measured(name: str, seconds: list[float], peak: float) -> dict[str, Any]:
        rounds = [{"seconds": s, "peak_rss": peak} for s in seconds]
        return {"name": name, "threads": 2, "versions": {"torch": "9"}, "measurements": rounds}

    targets = (Target("seconds", "TRL", at_least=3.0), Target("peak_rss", "TRL", at_least=3.0))
    row = {
        "label": "r", "commit": "abc", "date": "2026-01-01", "failed": "",
        "skipped": ["vLLM: not installed"], "targets": [vars(t) for t in (*targets, Target("seconds", at_most=1.5))],
        "sides": [measured("Tokenloom", [1.0, 2.0, 4.0], 2e9), measured("TRL", [3.0, 8.0, 6.0], 4e9)],
    }  # fmt: skip
    machine = {"processor": "P", "cores": 2, "memory_gb": 24, "system": "S"}
    several = Table("t", "T", lambda quick: [], (SECONDS, PEAK, Metric("other", "other", compare=False)))
    lines = page.table_block(several, {"machine": machine, "rows": [row]}).splitlines()
    assert lines[2] == "| r | Tokenloom | 2 s (1–4) | 2 GB |  |  |  | time ≤ 1.5 s: **missed** |"
    assert lines[3] == (
        "|  | TRL | 6 s (3–8) | 4 GB |  | **3×** (1.5–4) | **2×** (2–2) "
        "| time ≥ 3×: met<br>peak memory ≥ 3×: **missed** |"
    )
    assert "not measured: vLLM: not installed" in lines[4]
    assert lines[-1] == (
        "*Median (smallest–largest) of 3 rounds, sides alternating; P, 2 cores, 24 GB, S; 2 threads; torch 9; "
        "commit abc, 2026-01-01.*"
    )


def test_results_do_not_say_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path))
    settings = {"model": str(tmp_path / "models" / "m"), "rows": 3, "name": "plain"}
    assert store.portable(settings) == {"model": "cache:models/m", "rows": 3, "name": "plain"}
    for path in store.RESULTS.glob("*.json"):
        assert str(Path.home()) not in path.read_text(encoding="utf-8"), path.name


def test_the_page_is_what_the_stored_results_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    tables = [run.table_named(name) for name in run.TABLES]
    assert run.rendered(tables, text) == text
    for name, each in zip(run.TABLES, tables, strict=True):
        assert each.name == name
        assert f"<!-- bench:{each.name} -->" in text
        if name != "logprobs-gpu" or torch.cuda.is_available():
            assert each.rows(False)
            assert each.rows(True)


# -- the same work


def test_prompts_have_the_length_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path))
    from bench.inputs import model_folder, prompt_file, prompts

    texts = prompts("random-64", 3, 7)
    assert len(set(texts)) == 3
    assert [len(ids) for ids in json.loads(prompt_file("random-64", 3, 7).read_text(encoding="utf-8"))] == [7, 7, 7]
    with pytest.raises(ValueError, match="known: smollm2 and random-V"):
        model_folder("gpt-5")


@pytest.mark.slow
def test_both_sides_of_a_step_make_the_same_number_of_tokens() -> None:
    pytest.importorskip("trl")
    from bench.grpo_step import SMALL, rows

    found = alternate(rows(True)[0].sides, 1)
    wanted = SMALL["groups"] * SMALL["group_size"] * SMALL["new_tokens"]
    assert {name: side.measurements[0]["tokens"] for name, side in found.items()} == {
        "Tokenloom": wanted,
        "TRL": wanted,
    }
