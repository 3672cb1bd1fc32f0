"""Losses, gradients and weights that are not numbers; folders in use; recipes that changed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenloom.batch import Rollouts
from tokenloom.train import checkpoint
from tokenloom.train.errors import TrainingDiverged
from tokenloom.train.recipe import Recipe
from tokenloom.train.session import Session
from train.setups import EVAL, Remembers, Tiny, lines, steps, train

NAN_PART = '''
"""A surrogate that fails at the steps asked for: in its value, or only in its gradient."""

from tokenloom import part


@part("fails", stage="surrogate", scope="token", paper="none")
def fails(ratio, advantages, step, *, first: int = 1, last: int = 1, gradient: bool = False):
    value = ratio * advantages
    if first <= step <= last:
        # The root of zero is zero, and its slope is infinite.
        value = value + (ratio - ratio.detach()).abs().sqrt() if gradient else value * float("nan")
    return value
'''


def failing(tiny: Tiny, *, count: int = 5, **params: object) -> Recipe:
    # One file for all: a part's name belongs to the file that it was first read from.
    file = tiny.folder / "fails.py"
    file.write_text(NAN_PART, encoding="utf-8")
    algorithm = {"preset": "grpo", "surrogate": {"part": f"{file}:fails", **params}}
    return tiny.recipe(algorithm=algorithm, train={"steps": count, "learning_rate": 0.01, "eval": EVAL})


@pytest.mark.parametrize("gradient", [False, True])
def test_an_update_that_is_no_number_is_skipped(tiny: Tiny, tmp_path: Path, gradient: bool) -> None:
    recipe = failing(tiny, gradient=gradient)
    run = tmp_path / "run"
    seen = Remembers()
    with Session(recipe, run, [seen]) as session:
        session.trainer.step(0)
        before = {n: p.detach().clone() for n, p in session.trainer.policy.trainable_parameters()}
        session.trainer.step(1)
        assert all(torch.equal(p, before[n]) for n, p in session.trainer.policy.trainable_parameters())
        assert session.trainer.bad_steps == 1
        session.trainer.step(2)
        assert not all(torch.equal(p, before[n]) for n, p in session.trainer.policy.trainable_parameters())
        assert session.trainer.bad_steps == 0
    assert [line.get("skipped_updates") for line in lines(run)] == [None, 1, None]
    what = "gradient" if gradient else "loss"
    (message,) = [m for m in seen.messages if "not a number" in m]
    assert f"step 2: the {what} is not a number" in message
    folder = run / "bad" / "step-000002-update-1"
    assert str(folder) in message
    rollouts = Rollouts.load(folder)
    tensors = load_file(folder / "signals.safetensors")
    assert tensors["plan.advantages"].shape == rollouts.mask.shape
    assert len(tensors["rows"]) == len(tensors["signals.logprobs"])


def test_other_updates_of_the_step_go_on(tiny: Tiny, tmp_path: Path) -> None:
    recipe = failing(tiny, first=0, last=0)
    algorithm = recipe.algorithm
    assert isinstance(algorithm, dict)
    recipe = tiny.recipe(algorithm=algorithm | {"updates": {"mini_batches": 3}})
    _, _ = train(recipe, tmp_path / "run")
    found = sorted(p.name for p in (tmp_path / "run" / "bad").iterdir())
    assert found[0] == "step-000001-update-1"
    assert steps(tmp_path / "run")[0]["skipped_updates"] == len(found)


def test_three_in_a_row_stop_the_run(tiny: Tiny, tmp_path: Path) -> None:
    recipe = failing(tiny, first=2, last=9, count=9)
    run = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match="3 steps in a row") as caught:
        train(recipe, run)
    text = str(caught.value)
    assert "the weights are finite" in text
    assert "learning_rate" in text
    assert str(run / "bad") in text
    assert "checkpoint of step 4" in text
    assert [line.get("skipped_updates") for line in steps(run)] == [None, None, 1, 1, 1]
    found = checkpoint.load_newest(run / "checkpoints")
    assert found is not None
    assert found.step == 4
    assert all(bool(v.isfinite().all()) for v in found.weights.values())
    # As it was it fails again; with another recipe the count starts anew.
    with pytest.raises(TrainingDiverged):
        train(recipe, run, resume=True)
    healed = failing(tiny, first=4, last=5, count=9)
    outcome, _ = train(healed, run, resume=True, force=True)
    assert outcome.steps == 9


def test_weights_that_are_not_finite_stop_the_run_before_they_are_saved(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(train={"steps": 9, "learning_rate": 0.01, "eval": EVAL})
    run = tmp_path / "run"
    with Session(recipe, run, []) as session:
        trainer = session.trainer
        trainer.step(0)
        trainer.done = 1
        trainer.save_checkpoint()
        name, parameter = trainer.policy.trainable_parameters()[3]
        with torch.no_grad():
            parameter.view(-1)[0] = math.inf
        with pytest.raises(TrainingDiverged, match=f"first '{name}'") as caught:
            trainer.train()
        assert "earlier update" in str(caught.value)
        assert "checkpoint of step 1" in str(caught.value)
        with pytest.raises(TrainingDiverged, match="no checkpoint was written"):
            trainer.save_checkpoint()
        with pytest.raises(TrainingDiverged, match="evaluation after step 0"):
            trainer._evaluate(0, 0)
    outcome, _ = train(recipe, run, resume=True)
    assert outcome.steps == 9


def test_a_learning_rate_beyond_reason_ends_with_a_diagnosis(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(train={"steps": 9, "learning_rate": 1e38, "weight_decay": 10.0, "eval": EVAL})
    with pytest.raises(TrainingDiverged, match=r"weights are not finite|weights are finite") as caught:
        train(recipe, tmp_path)
    assert "its beginning" in str(caught.value)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_an_existing_run_is_not_begun_again(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.recipe(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for recipe in (tiny.recipe(), tiny.recipe(train={"steps": 1})):
        with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
            train(recipe, tmp_path)
    with pytest.raises(ValueError, match=r"differs.*train\.steps: 3 -> 5; train\.seed: 0 -> 1"):
        train(tiny.recipe(train={"steps": 5, "seed": 1}), tmp_path, resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_in_use_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with Session(tiny.recipe(), tmp_path, []):
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing"):
                train(tiny.recipe(), tmp_path, resume=resume)


def test_a_recipe_that_does_not_fit_the_checkpoint_replaces_nothing(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.recipe(), tmp_path)
    before = (tmp_path / "recipe.yaml").read_bytes()
    other = tiny.recipe(model={"lora": {"rank": 2}}, train={"steps": 5})
    with pytest.raises(ValueError, match="the state is of another policy"):
        train(other, tmp_path, resume=True, force=True)
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_problems_that_changed_are_told(tiny: Tiny, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    shutil.copy(tiny.problems, problems)
    training = {"steps": 2, "learning_rate": 0.01, "eval": EVAL}
    recipe = tiny.recipe(task={"source": str(problems)}, train=training)
    train(recipe, tmp_path / "run")
    text = problems.read_text(encoding="utf-8").splitlines(keepends=True)
    problems.write_text("".join(text[:-1]), encoding="utf-8")
    longer = tiny.recipe(task={"source": str(problems)}, train=training | {"steps": 3})
    _, seen = train(longer, tmp_path / "run", resume=True, force=True)
    assert any("training problems are not those" in m for m in seen.messages)


def test_a_run_without_a_whole_checkpoint_starts_over(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe()
    train(recipe, tmp_path / "a")
    with Session(recipe, tmp_path / "b", []) as session:
        session.trainer.step(0)
        session.trainer.run.append("samples.jsonl", {"left": "over"})
        session.trainer.done = 1
        session.trainer.save_checkpoint()
    (tmp_path / "b/checkpoints/step-000001/progress.json").write_text("", encoding="utf-8")
    _, seen = train(recipe, tmp_path / "b", resume=True)
    assert "resuming from the beginning" in seen.messages
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
