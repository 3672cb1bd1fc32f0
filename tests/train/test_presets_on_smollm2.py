"""Every preset of the family takes a step on a real model: the quickstart's, two prompts of two short responses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import presets
from tokenloom.train.recipe import load_recipe
from tokenloom.train.session import Session
from train.setups import lines

SLUGS = sorted(s for s, p in presets().items() if p.family == "policy-optimization" or s == "segment-po")
SMALL = [
    "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_tokens=8", "train.steps=1", "task.size=8",
    "train.eval.every=1", "train.eval.problems=1", "train.eval.samples=1", "train.eval.final_samples=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_a_step(tmp_path: Path, slug: str) -> None:
    extra: list[str] = []
    if Algorithm.from_recipe(slug).corpus:
        (tmp_path / "text.txt").write_text("The harbor was quiet in the morning. " * 40, encoding="utf-8")
        extra = [f"corpus.path={tmp_path / 'text.txt'}", "corpus.max_tokens=32"]
    recipe = load_recipe("quickstart", [*SMALL, f"algorithm={slug}", *extra])
    with Session(recipe, tmp_path / "run", []) as session:
        start = {n: p.detach().clone() for n, p in session.trainer.policy.trainable_parameters()}
        session.trainer.step(0)
        moved = dict(session.trainer.policy.trainable_parameters())
        assert all(bool(p.isfinite().all()) for p in moved.values())
        # Equal rewards in every group may leave nothing to learn; what is there must be numbers all the same.
        changed = any(not torch.equal(moved[n], start[n]) for n in start)
    (record,) = lines(tmp_path / "run")
    numbers = [v for v in record.values() if not isinstance(v, str) and v is not None]
    assert all(math.isfinite(v) for v in numbers), record
    assert "skipped_updates" not in record
    assert changed == (record["grad_norm"] > 0)
