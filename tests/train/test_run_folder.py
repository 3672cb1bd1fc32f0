"""The run folder: one writer, lines that survive anything, files cut back to where a checkpoint saw them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tokenloom.report.jsonl import number
from tokenloom.train.plain import write_yaml
from tokenloom.train.recipe import differences
from tokenloom.train.run import RunFolder, next_run_folder, rounded, write_text
from train.setups import Tiny


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_one_writer_at_a_time(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="another process is writing"):
        RunFolder(run.path)
    run.close()
    RunFolder(run.path).close()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "x")


def test_files_are_cut_back(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    sizes = run.sizes()
    run.append("metrics.jsonl", {"step": 2})
    run.append("samples.jsonl", {"step": 2})
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "torn')
    assert run.cut(sizes) == []
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    assert (run.path / "samples.jsonl").read_bytes() == b""


def test_a_file_shorter_than_remembered_is_never_padded(run: RunFolder) -> None:
    for step in range(3):
        run.append("metrics.jsonl", {"step": step})
        run.append("tokens.jsonl", {"step": step})
    sizes = run.sizes()
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    (run.path / "tokens.jsonl").unlink()
    assert run.cut(sizes) == ["metrics.jsonl", "tokens.jsonl"]
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    assert not (run.path / "tokens.jsonl").exists()


def test_without_a_checkpoint_everything_goes(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    run.cut({})
    assert (run.path / "metrics.jsonl").read_bytes() == b""


HOSTILE = "\ud800 \u2028 \x00 </script> \N{SNOWMAN}"


def test_lines_hold_whatever_a_model_or_a_user_writes(run: RunFolder) -> None:
    record = {
        "text": HOSTILE,
        "nan": math.nan,
        "inf": [-math.inf, 1.0],
        "answer": {1, 2},
        "third": 1 / 3,
        "n": 123456789,
    }
    run.append("samples.jsonl", record)
    raw = (run.path / "samples.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    found = json.loads(raw)
    assert found["text"] == HOSTILE
    assert found["nan"] is None
    assert found["inf"] == [None, 1.0]
    assert found["third"] == 0.33333
    assert found["n"] == 123456789
    assert found["answer"] == "{1, 2}"


def test_rounding_keeps_significant_digits() -> None:
    assert rounded({"a": (1.234567e-7, True, None, "x", 5)}) == {"a": [1.2346e-07, True, None, "x", 5]}
    assert number(rounded(math.nan)) is None


def test_a_run_is_begun_by_its_recipe_and_nothing_less(
    tiny: Tiny, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe()
    written: list[str] = []

    def stop_at_recipe(path: Path, text: str) -> None:
        if path.name == "recipe.yaml":
            raise KeyboardInterrupt
        written.append(path.name)
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("tokenloom.train.run.write_text", stop_at_recipe)
        with pytest.raises(KeyboardInterrupt):
            run.begin(recipe)
    assert written == ["run.json"]
    assert not run.begun
    run.begin(recipe)
    assert run.begun
    assert not run.finished
    assert run.changed(recipe) == {}
    run.finish({"steps": 3})
    described = run.read_json("run.json")
    assert run.finished
    assert described["steps"] == 3
    assert described["seed"] == 0
    assert {"python", "torch", "transformers", "tokenloom"} <= described["versions"].keys()
    assert described["algorithm"]["name"] == "grpo"


def test_what_changed_is_named(tiny: Tiny, run: RunFolder) -> None:
    run.begin(tiny.recipe())
    other = tiny.recipe(train={"steps": 4}, rollout={"stop": ["1e-5", "0"]}, algorithm="dapo")
    changed = run.changed(other)
    assert changed["train.steps"] == (3, 4)
    assert changed["rollout.stop"] == ([], ["1e-5", "0"])
    assert changed["algorithm"] == (None, "dapo")
    assert changed["algorithm.preset"] == ("grpo", None)
    assert len(changed) == 4
    run.begin(other)
    assert run.changed(other) == {}


def test_a_key_that_came_later_counts_with_its_default(tiny: Tiny, run: RunFolder) -> None:
    recipe = tiny.recipe()
    run.begin(recipe)
    older = run.saved_recipe()
    del older["train"]["optimizer_states"], older["log"]
    write_text(run.path / "recipe.yaml", write_yaml(older))
    assert "log.project" in differences(run.saved_recipe(), recipe.resolved())
    changed = run.changed(tiny.recipe(log={"project": "tokenloom"}, train={"optimizer_states": "bfloat16", "steps": 3}))
    assert changed["train.optimizer_states"] == ("float32", "bfloat16")
    assert set(changed) <= {"train.optimizer_states", "log.tokens_every", "log.tokens_rows", "log.samples"}


def test_a_key_that_is_gone_counts_as_changed(tiny: Tiny, run: RunFolder) -> None:
    recipe = tiny.recipe()
    run.begin(recipe)
    older = run.saved_recipe()
    older["train"]["warp"] = 9
    write_text(run.path / "recipe.yaml", write_yaml(older))
    assert run.changed(recipe) == {"train.warp": (9, None)}


def test_the_next_folder_is_the_first_free(tmp_path: Path) -> None:
    (tmp_path / "a-001").mkdir()
    (tmp_path / "a-002").mkdir()
    assert next_run_folder("a", tmp_path) == tmp_path / "a-003"


def test_text_is_replaced_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="full"):
            write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
