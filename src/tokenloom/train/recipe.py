"""Recipes: one YAML file says everything about a run.

A recipe is found by name (those shipped in `tokenloom/recipes`), by path, or in a run folder; any key
is overridden by `section.key=value`. Everything wrong is reported before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenloom.algorithm import Algorithm
from tokenloom.hints import suggest
from tokenloom.policy.config import ModelConfig, ValueHeadSection
from tokenloom.rollout.config import RolloutConfig
from tokenloom.tasks.config import TaskConfig
from tokenloom.tasks.task import check_task
from tokenloom.train.config import LogConfig, TrainConfig
from tokenloom.train.corpus import CorpusConfig, check_corpus
from tokenloom.train.errors import RecipeError, explain
from tokenloom.train.plain import plain, read_yaml, write_yaml


class Recipe(BaseModel):
    """A run, complete: model, task, algorithm, rollout, train, log."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("custom", description="A short name; run folders are named after it.")
    description: str = Field("", description="What the recipe is for.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig
    algorithm: str | dict[str, Any] = Field(
        ..., description="A preset's name, or a mapping with `preset`, its parameters, and stages to change."
    )
    corpus: CorpusConfig | None = Field(None, description="Plain text for the algorithm's terms over a corpus.")
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig())
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    log: LogConfig = Field(default_factory=lambda: LogConfig())

    @field_validator("algorithm")
    @classmethod
    def _composes(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        Algorithm.from_recipe(value)
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._can_stop_early()
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps = {self.train.warmup_steps} leaves no step of train.steps = {self.train.steps} at "
                "the full learning rate; lower it"
            )
        algorithm = self.build_algorithm()
        if "old_values" in algorithm.needs or "values" in algorithm.loss_needs:
            # The algorithm asks for a critic, so it gets one; the resolved recipe says so.
            self.model.value_head = self.model.value_head or ValueHeadSection()
        self._has_its_text(algorithm)
        groups, size = self.rollout.prompts_per_step, self.rollout.group_size
        if size == 1 and algorithm.advantage.part.scope == "group":
            raise ValueError(
                f"rollout.group_size = 1, but the advantage {algorithm.advantage.part.name!r} compares the responses "
                "of a group: every advantage would be zero. Use at least 2 (8 is common)"
            )
        if size == 1 and algorithm.refill:
            raise ValueError(
                "rollout.group_size = 1, but the algorithm drops groups whose outcomes are all equal: nothing would "
                "ever be kept. Use at least 2 (8 is common)"
            )
        parts = algorithm.updates.params.get("mini_batches", 1)
        if isinstance(parts, int) and parts > groups:
            raise ValueError(
                f"algorithm.updates.mini_batches = {parts} exceeds rollout.prompts_per_step = {groups}: "
                "groups are dealt out whole"
            )
        if self.task.environment and algorithm.refill:
            raise ValueError("a multi-turn task cannot be combined with an algorithm that resamples groups")
        return self

    def _has_its_text(self, algorithm: Algorithm) -> None:
        if algorithm.corpus and self.corpus is None:
            names = ", ".join(repr(term.part.part.name) for term in algorithm.corpus)
            raise ValueError(
                f"the algorithm has terms over a corpus ({names}), but the recipe names no text for them; "
                "add corpus.path=FILE.txt, or drop the terms with algorithm.corpus=null"
            )
        if self.corpus is not None and not algorithm.corpus:
            raise ValueError("the recipe has a corpus, but the algorithm no terms over one; drop it with corpus=null")

    def _can_stop_early(self) -> None:
        stop, evaluation = self.train.early_stop, self.train.eval
        if stop is None:
            return
        if stop.target is None and stop.patience is None:
            raise ValueError("train.early_stop says no reason to stop; give it a target, a patience, or both")
        if not evaluation.every:
            raise ValueError("train.early_stop is judged at evaluations, and train.eval.every = 0 makes none; set it")
        if stop.metric == "sampled" and not evaluation.samples:
            raise ValueError(
                "train.early_stop.metric = 'sampled', but train.eval.samples = 0: nothing is sampled; "
                "use metric greedy, or sample"
            )

    def build_algorithm(self) -> Algorithm:
        """The algorithm, composed anew."""
        return Algorithm.from_recipe(self.algorithm)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data for YAML and for comparison."""
        data: dict[str, Any] = plain(self.model_dump(), "recipe")
        return data

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return write_yaml(self.resolved())


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe by name, path or run folder and apply overrides `section.key=value` (YAML values).

    Raises:
        RecipeError: naming the key, the value, what is allowed and the nearest known name.
    """
    data = _read(source)
    for override in overrides:
        data = _apply(data, override)
    return build_recipe(data, str(source), check_files=check_files)


def build_recipe(data: Mapping[str, Any], source: str = "recipe", *, check_files: bool = True) -> Recipe:
    """Validate plain data as a recipe.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        # Strict, so that true is no number and "3" is none either; as JSON, so that a list may stand for a tuple.
        recipe = Recipe.model_validate_json(json.dumps(plain(data, source)), strict=True)
        if check_files:
            check_task(recipe.task)
            _check_text(recipe.corpus, source)
    except RecipeError:
        raise
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source)) from None
    except ValueError as error:
        raise RecipeError(f"{source}: task: {error}") from error
    return recipe


def _check_text(corpus: CorpusConfig | None, source: str) -> None:
    if corpus is None:
        return
    try:
        check_corpus(corpus)
    except ValueError as error:
        raise RecipeError(f"{source}: corpus.path: {error}") from error


def recipe_names() -> dict[str, str]:
    """The shipped recipes with their descriptions."""
    found = {}
    for entry in resources.files("tokenloom.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            shipped = read_yaml(entry.read_text(encoding="utf-8"), entry.name)
            found[entry.name.removesuffix(".yaml")] = str(shipped.get("description", ""))
    return dict(sorted(found.items()))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tokenloom recipe"
    return schema


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) whose values differ between two resolved recipes, with both values."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [*flat_old, *(k for k in flat_new if k not in flat_old)]
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def _read(source: str | Path) -> dict[str, Any]:
    path, names = Path(source), recipe_names()
    if path.is_dir() and ((path / "recipe.yaml").is_file() or str(source) not in names):
        path = path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {str(path)!r}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    elif str(source) in names:
        text = (resources.files("tokenloom.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"unknown recipe {str(source)!r}{suggest(str(source), names)} "
            "A recipe is a shipped name, a .yaml file, or a run folder."
        )
    data = read_yaml(text, str(source))
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return data


def _apply(data: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    made: dict[str, Any] = _put(data, path, read_yaml(text, f"override {override!r}"), override)
    return made


def _put(here: Any, path: list[str], value: Any, override: str, done: tuple[str, ...] = ()) -> Any:
    """A copy of `here` with `value` at `path`; sections on the way are made, entries of lists named by number."""
    if not path:
        return value
    if isinstance(here, str) and done[:1] == ("algorithm",):
        # Short for a mapping: the algorithm names its preset, a stage its part.
        here = {"preset" if len(done) == 1 else "part": here}
    name, rest = path[0], path[1:]
    if isinstance(here, list) and name.isdecimal() and int(name) < len(here):
        at = int(name)
        return [*here[:at], _put(here[at], rest, value, override, (*done, name)), *here[at + 1 :]]
    if here is not None and not isinstance(here, dict):
        kind = f"a list with the entries 0 to {len(here) - 1}" if isinstance(here, list) and here else f"{here!r}"
        raise RecipeError(f"override {override!r}: {'.'.join(done)} is {kind}, there is no {name!r} in it")
    here = here or {}
    return here | {name: _put(here.get(name), rest, value, override, (*done, name))}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
