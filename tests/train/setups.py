"""Tiny runs for the tests of training: recipes around one random Llama, and an observer that remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cli.tiny_run import make_tiny_model, tiny_problems
from tokenloom.train.events import Silent
from tokenloom.train.loop import Outcome
from tokenloom.train.recipe import Recipe, build_recipe
from tokenloom.train.session import Session

EVAL = {"samples": 1, "problems": 3}


class Tiny:
    """A folder with a tiny model and its problems; `recipe` and `data` describe runs with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny_model(folder)
        self.problems = tiny_problems(folder)

    def data(self, **sections: Any) -> dict[str, Any]:
        """Three steps of 3 prompts x 4 responses; a mapping among `sections` updates the section."""
        recipe: dict[str, Any] = {
            "name": "tiny",
            "model": {"name": str(self.model), "self_test": False},
            "task": {"source": str(self.problems), "heldout": 8, "rewards": [{"verifier": "number"}], "workers": 1},
            "algorithm": {"preset": "grpo"},
            "rollout": {"prompts_per_step": 3, "group_size": 4, "max_tokens": 3},
            "train": {"steps": 3, "learning_rate": 0.01, "checkpoint_every": 1, "eval": EVAL},
            "log": {"tokens_every": 2, "tokens_rows": 4, "samples": 2},
        }
        for name, value in sections.items():
            recipe[name] = recipe[name] | value if isinstance(value, dict) and name in recipe else value
        return recipe

    def recipe(self, **sections: Any) -> Recipe:
        return build_recipe(self.data(**sections))


class Remembers(Silent):
    """Keeps the messages, and calls `hook(stage, done)` on progress."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.closed = 0

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.closed += 1


def train(recipe: Recipe, run: Path, **options: Any) -> tuple[Outcome, Remembers]:
    """Run a recipe to its end; the outcome and what was said."""
    seen = Remembers()
    with Session(recipe, run, [seen], **options) as session:
        return session.trainer.train(), seen


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_results(a: Path, b: Path) -> None:
    """Byte for byte the same deterministic files, bit for bit the same weights."""
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
