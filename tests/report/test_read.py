"""Reading run folders: whole, damaged, hostile, and things that are no run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report.make_run import make_run
from tokenloom.report import read_run
from tokenloom.report.text import printable, prompt_text

FILES = ["recipe.yaml", "run.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "tokens.jsonl"]


def test_whole_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=10))
    assert run.name == "run"
    assert [m["step"] for m in run.train] == list(range(1, 11))
    assert [m["step"] for m in run.evals] == [0, 5, 10]
    assert len(run.timing) == 10
    assert run.recipe["rollout"]["group_size"] == 8
    assert run.tokens.total == len(run.tokens.rows) == 120
    assert run.notes == ()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    file = folder / name
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(file.read_bytes()[:-7])
    run = read_run(folder)
    if (name, damage) != ("recipe.yaml", "torn"):
        assert any(note.startswith(name) for note in run.notes)
    assert len(run.notes) <= 1
    others = {"metrics.jsonl": run.train, "timing.jsonl": run.timing, "samples.jsonl": run.samples}
    assert all(content for other, content in others.items() if other != name)


def test_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    text = (folder / "timing.jsonl").read_text(encoding="utf-8")
    (folder / "timing.jsonl").write_text(text[:-10], encoding="utf-8")
    run = read_run(folder)
    assert [t["step"] for t in run.timing] == [1, 2, 3]
    assert "last line is torn" in run.notes[0]
    # Only the line end is lost: the object is whole, and counts.
    (folder / "timing.jsonl").write_text(text[:-1], encoding="utf-8")
    assert [t["step"] for t in read_run(folder).timing] == [1, 2, 3, 4]


def test_unreadable_lines_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    bad = [
        b"\0\0\0\0",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"step": 1e999}',
        b"\xff\xfe",
        b'{"step": 9' + b"9" * 5000 + b"}",
    ]
    (folder / "timing.jsonl").write_bytes(b"\n".join([b'{"step": 1, "seconds": NaN}', *bad, b'{"step": 2}', b""]))
    run = read_run(folder)
    assert [t["step"] for t in run.timing] == [1, 2]
    # Infinity as a step parses, but is no step; the other five are no JSON objects.
    assert run.notes == ("timing.jsonl: 5 lines unreadable, ignored (first: line 2).",)


def test_last_line_of_a_step_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 2, "kind": "train", "reward": 42.0}) + "\n")
    rewards = {m["step"]: m["reward"] for m in read_run(folder).train}
    assert rewards[2] == 42.0
    assert list(rewards) == [1, 2, 3]


def test_errors_name_the_mistake_and_the_remedy(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "first", steps=1)
    with pytest.raises(ValueError, match=r"does not exist.*Did you mean .*first\?.*tokenloom train"):
        read_run(tmp_path / "runs" / "frist")
    with pytest.raises(ValueError, match=r"not a run folder.*it holds first.*Did you mean .*first\?"):
        read_run(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"is a file.*give the folder"):
        read_run(tmp_path / "runs" / "first" / "run.json")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"none of recipe.yaml, run.json, metrics.jsonl.*it is empty"):
        read_run(tmp_path / "void")


def test_recipe_that_is_no_mapping_or_endless(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    (folder / "recipe.yaml").write_text("a: [1, 2", encoding="utf-8")
    run = read_run(folder)
    assert run.recipe == {}
    assert run.recipe_text == "a: [1, 2"
    assert "not valid YAML" in run.notes[0]
    (folder / "recipe.yaml").write_text("- 1\n", encoding="utf-8")
    assert read_run(folder).recipe == {}


def test_texts() -> None:
    assert printable("a\x1b[31m\u202e\ud800\n") == "a\\u001b[31m\\u202e\\ud800\\n"
    assert printable("x" * 300, 10) == "x" * 10 + "… [+290 characters]"
    assert prompt_text([{"role": "user", "content": "hi"}, {"content": "there"}]) == "user: hi\n\nuser: there"
    assert prompt_text({"odd": 1}) == '{"odd": 1}'
    assert prompt_text(None) == ""
