"""Cells are computed once, found again, and computed anew when what they depend on has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import catalog
from tokenloom.algorithm import Algorithm
from tokenloom.lab import cells
from tokenloom.lab.cells import Budget, Cell, kind_of, run_cell
from tokenloom.lab.oracle import NAME, oracle
from tokenloom.lab.runner import run
from tokenloom.masked import to_tokens
from tokenloom.signals import CHUNK_SIGNALS, chunk_signal

SMALL = Budget(batches=3, samples=64, group_size=4)
CELL = Cell("rloo", "critical-token", 0, budget=SMALL)


@pytest.fixture(autouse=True)
def catalog_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_PARTS", dict(catalog.parts()))
    monkeypatch.setattr(catalog, "_PRESETS", dict(catalog.presets()))


def test_a_record_holds_every_figure_and_is_json() -> None:
    record = run_cell(CELL)
    again = run_cell(CELL)
    assert json.loads(json.dumps(record, allow_nan=False))["status"] == "done"
    assert set(record["gradient"]) == {"cosine", "bias", "noise", "snr", "scale"}
    assert set(record["credit"]) == set(record["advantages"]) == {"correlation", "error", "mean_correlation"}
    assert record["learning"]["samples"] == [0, 16, 32, 48, 64]
    for name in ("gradient", "credit", "advantages"):
        assert record[name] == again[name]
    assert record["learning"]["objective"] == again["learning"]["objective"]


def test_steps_that_only_train_a_critic_are_left_out() -> None:
    names = {bound.part.name for _, bound in cells.algorithm_of("vapo").bound_parts()}
    assert "vapo" in names
    assert "vapo/value-pretraining" not in names
    assert "vapo/value-pretraining" in {b.part.name for _, b in Algorithm.from_recipe("vapo").bound_parts()}
    assert run_cell(replace(CELL, method="vapo"))["gradient"]["cosine"]["value"] > 0


def test_the_key_tells_apart_what_the_numbers_depend_on(tmp_path: Path) -> None:
    others = [
        replace(CELL, seed=1), replace(CELL, family="conflict"), replace(CELL, method="grpo"),
        replace(CELL, budget=Budget()), replace(CELL, kind="transformer"),
    ]  # fmt: skip
    assert len({cells.key(c) for c in [CELL, *others]}) == 6
    assert cells.key(CELL) == cells.key(replace(CELL))
    # The same name with another hyperparameter.
    known = catalog.presets()["rloo"]
    changed = catalog.Preset(known.slug, known.paper, lambda: _other(), {})
    before = cells.key(CELL)
    catalog._PRESETS["rloo"] = changed
    assert cells.key(CELL) != before


def _other() -> Algorithm:
    return Algorithm.compose(advantage={"part": "rloo", "single": "reward"})


USERS = '''
from tokenloom import Algorithm, part, preset

@part("mine", stage="advantage", scope="row", paper="none")
def mine(rewards, mask):
    """{doc}"""
    return {factor} * rewards[:, None] * mask  # {doc}

@preset("mine", paper="none")
def my_preset():
    return Algorithm.compose(advantage=mine.__part__.name)
'''


def test_the_key_follows_a_users_code_but_not_its_comments(tmp_path: Path) -> None:
    keys = []
    path = tmp_path / "mine.py"
    for factor, doc in (("1.0", "one"), ("1.0", "another"), ("2.0", "one")):
        path.write_text(USERS.format(factor=factor, doc=doc), encoding="utf-8")
        catalog._PARTS.pop("mine", None)
        catalog._PRESETS.pop("mine", None)
        cells._code.cache_clear()
        keys.append(cells.key(replace(CELL, method=f"{path}:my_preset")))
    assert keys[0] == keys[1] != keys[2]


def test_what_a_task_cannot_provide_is_not_run_and_what_breaks_has_failed() -> None:
    @catalog.part("lab-test/needy", stage="advantage", scope="row", paper="a test")
    def needy(rewards: Tensor, mask: Tensor, returns: Tensor) -> Tensor:
        return to_tokens(rewards, mask)

    @catalog.part("lab-test/broken", stage="advantage", scope="row", paper="a test")
    def broken(rewards: Tensor, mask: Tensor) -> Tensor:
        raise KeyError("no such vote")

    for name in ("needy", "broken"):

        @catalog.preset(f"lab-test-{name}", paper="a test")
        def made(*, part: str = f"lab-test/{name}") -> Algorithm:
            return Algorithm.compose(advantage=part)

    assert run_cell(replace(CELL, method="lab-test-broken")) | {"seconds": 0} == {
        "method": "lab-test-broken", "family": "critical-token", "seed": 0, "kind": "table",
        "budget": {"batches": 3, "samples": 64, "group_size": 4}, "status": "failed",
        "reason": "KeyError: 'no such vote'", "seconds": 0,
    }  # fmt: skip
    needed = run_cell(replace(CELL, method="lab-test-needy"))
    assert needed["status"] == "not run"
    assert "needs 'returns'" in needed["reason"]


def test_hidden_states_and_attention_take_a_transformer() -> None:
    before = dict(CHUNK_SIGNALS)
    try:

        @chunk_signal("lab_test_hidden", "hidden")
        def hidden(hidden: Tensor) -> Tensor:
            return hidden.sum(-1)

        @catalog.part("lab-test/hidden", stage="weight", scope="token", paper="a test")
        def reads(lab_test_hidden: Tensor, mask: Tensor) -> Tensor:
            return mask.to(lab_test_hidden.dtype)

        algorithm = Algorithm.compose(advantage="rloo", weight=["lab-test/hidden"])
    finally:
        kinds = [kind_of(algorithm), kind_of(oracle())]
        CHUNK_SIGNALS.clear()
        CHUNK_SIGNALS.update(before)
    assert kinds == ["transformer", "table"]


def test_a_later_run_finds_what_an_earlier_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [replace(CELL, method=m, seed=s) for m in ("rloo", NAME) for s in (0, 1)]
    computed: list[Cell] = []
    original = run_cell

    def counted(cell: Cell) -> dict[str, Any]:
        computed.append(cell)
        return original(cell)

    monkeypatch.setattr("tokenloom.lab.runner.run_cell", counted)
    first = run(wanted[:3], tmp_path, workers=1)
    assert len(computed) == 3
    reports: list[tuple[int, int, str]] = []
    second = run(wanted, tmp_path, workers=1, report=lambda *seen: reports.append(seen))
    assert computed[3:] == wanted[3:]
    assert second[:3] == first
    assert [r["seed"] for r in second] == [0, 1, 0, 1]
    assert reports[-1][:2] == (4, 4)
    # A torn file is no record.
    next(tmp_path.glob("*.json")).write_text("{", encoding="utf-8")
    run(wanted, tmp_path, workers=1)
    assert len(computed) == 5
    threads = torch.get_num_threads()
    run([replace(CELL, seed=9)], tmp_path, workers=1)
    assert torch.get_num_threads() == threads


def test_failures_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(cell: Cell) -> dict[str, Any]:
        return {"method": cell.method, "family": cell.family, "status": "failed", "reason": "broken"}

    monkeypatch.setattr("tokenloom.lab.runner.run_cell", fails)
    assert run([CELL], tmp_path, workers=1)[0]["status"] == "failed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    wanted = [replace(CELL, seed=s) for s in range(4)]
    many, one = run(wanted, tmp_path / "many", workers=2), run(wanted, tmp_path / "one", workers=1)
    for a, b in zip(many, one, strict=True):
        assert a["gradient"] == b["gradient"]
        assert a["learning"]["objective"] == b["learning"]["objective"]
