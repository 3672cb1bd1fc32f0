"""Checkpoints: what goes in comes out, whatever is damaged or left over."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.train import checkpoint
from tokenloom.train.checkpoint import Checkpoint, damage, load_newest, pack, save, steps, unpack


def make(step: int, **state: Any) -> Checkpoint:
    weights = {"w": torch.full((2, 3), float(step)), "b": torch.arange(3).to(torch.bfloat16)}
    optimizer = {"step/w": torch.tensor([float(step)]), "exp_avg/w": torch.randn(2, 3)}
    return Checkpoint(step, weights, optimizer, state, {"data": {"epoch": step}, "best": [0.1, 1 / 3]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = make(3, a={"mean": torch.tensor(0.5), "n": 2, "name": None, "pair": (1, 2.5), "list": [True, "x"]})
    save(tmp_path, saved, keep=1)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert found.progress == saved.progress
    for group in ("weights", "optimizer"):
        assert getattr(found, group).keys() == getattr(saved, group).keys()
        for name, value in getattr(saved, group).items():
            assert torch.equal(getattr(found, group)[name], value)
            assert getattr(found, group)[name].dtype == value.dtype
    assert found.algorithm["a"]["pair"] == (1, 2.5)
    assert found.algorithm["a"]["list"] == [True, "x"]
    assert found.algorithm["a"]["mean"] == torch.tensor(0.5)


text = st.text(max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
nested = st.recursive(
    leaves, lambda s: st.lists(s, max_size=3) | st.tuples(s, s) | st.dictionaries(text, s, max_size=3), max_leaves=8
)
states = st.dictionaries(text, nested, max_size=3)


@settings(max_examples=40, deadline=None)
@given(states)
def test_any_state_of_plain_values_comes_back(state: dict[str, Any]) -> None:
    tensors, plain = pack(state)
    assert tensors == {}
    assert unpack(tensors, plain) == state


def test_tensors_in_a_state_keep_apart(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {"a.b": shared, "a": {"b": shared[:2], "c": [shared, torch.tensor(True)]}}
    save(tmp_path, make(1, **state), keep=1)
    found = load_newest(tmp_path)
    assert found is not None
    assert torch.equal(found.algorithm["a.b"], shared)
    assert torch.equal(found.algorithm["a"]["b"], shared[:2])
    assert torch.equal(found.algorithm["a"]["c"][1], torch.tensor(True))


@pytest.mark.parametrize(("state", "says"), [({"a": {1: 2}}, "key 1"), ({"a": {"b": {3}}}, "'a.b' is a set")])
def test_a_state_that_cannot_be_saved_is_named(state: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pack(state)


def test_random_states_continue(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(numpy.random.normal()), float(torch.rand(()))]

    checkpoint.seed_random_states(2**62 + 5)
    first = draw()
    save(tmp_path, make(1), keep=1)
    expected = draw()
    draw()
    load_newest(tmp_path)
    assert draw() == expected
    checkpoint.seed_random_states(2**62 + 5)
    assert draw() == first


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 1_000_000):
        save(tmp_path, make(step), keep=2)
    assert steps(tmp_path) == [10, 1_000_000]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("harm", ["cut", "missing", "manifest", "no manifest"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, make(1), keep=3)
    path = save(tmp_path, make(2), keep=3)
    file = path / "weights.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "missing":
        file.unlink()
    elif harm == "manifest":
        (path / "manifest.json").write_text('{"weights', encoding="utf-8")
    else:
        (path / "manifest.json").unlink()
    assert damage(path)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-000002" in caplog.text


def test_a_damaged_or_later_one_never_pushes_a_whole_one_out(tmp_path: Path) -> None:
    save(tmp_path, make(5), keep=1)
    (tmp_path / "step-000009").mkdir()
    save(tmp_path, make(6), keep=1)
    assert steps(tmp_path) == [6]
    assert load_newest(tmp_path) is not None


def test_leftovers_of_a_kill_go_and_mean_nothing(tmp_path: Path) -> None:
    save(tmp_path, make(1), keep=1)
    for name in (".writing-step-000002", ".removing-step-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    checkpoint.tidy(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    (tmp_path / ".writing-step-000003").mkdir()
    save(tmp_path, make(3), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def test_tidying_leaves_what_it_cannot_judge(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, make(step), keep=3)
    (tmp_path / "step-000004").mkdir()
    checkpoint.tidy(tmp_path, keep=1)
    assert steps(tmp_path) == [3, 4]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere") is None
    (tmp_path / "step-x").mkdir()
    assert load_newest(tmp_path) is None


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, make(1, a=1), keep=1)
    save(tmp_path, make(1, a=2), keep=1)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.algorithm == {"a": 2}
