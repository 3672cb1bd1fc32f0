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

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import suggest
from tokenloom.policy.config import ModelConfig, ValueHeadSection
from tokenloom.rollout.config import RolloutConfig
from tokenloom.tasks.config import TaskConfig
from tokenloom.tasks.task import check_task
from tokenloom.train.config import LogConfig, TrainConfig
from tokenloom.train.errors import RecipeError, explain


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
        algorithm = self.build_algorithm()
        if "old_values" in algorithm.needs or "values" in algorithm.loss_needs:
            # The algorithm asks for a critic, so it gets one; the resolved recipe says so.
            self.model.value_head = self.model.value_head or ValueHeadSection()
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

    def build_algorithm(self) -> Algorithm:
        """The algorithm, composed anew."""
        return Algorithm.from_recipe(self.algorithm)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data for YAML and for comparison."""
        plain: dict[str, Any] = json.loads(self.model_dump_json())
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe by name, path or run folder and apply overrides `section.key=value` (YAML values).

    Raises:
        RecipeError: naming the key, the value, what is allowed and the nearest known name.
    """
    data = _read(source)
    for override in overrides:
        _apply(data, override)
    return build_recipe(data, str(source), check_files=check_files)


def build_recipe(data: Mapping[str, Any], source: str = "recipe", *, check_files: bool = True) -> Recipe:
    """Validate plain data as a recipe.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(dict(data))
        if check_files:
            check_task(recipe.task)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source)) from None
    except ValueError as error:
        raise RecipeError(f"{source}: task: {error}") from error
    return recipe


def recipe_names() -> dict[str, str]:
    """The shipped recipes with their descriptions."""
    found = {}
    for entry in resources.files("tokenloom.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            text = yaml.safe_load(entry.read_text(encoding="utf-8"))
            found[entry.name.removesuffix(".yaml")] = str(text.get("description", ""))
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
    path = Path(source)
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {str(path)!r}")
        text = path.read_text(encoding="utf-8")
    else:
        names = recipe_names()
        if str(source) not in names:
            raise RecipeError(
                f"unknown recipe {str(source)!r}{suggest(str(source), names)} "
                "A recipe is a shipped name, a .yaml file, or a run folder."
            )
        text = (resources.files("tokenloom.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    plain: dict[str, Any] = _numeric(data)
    return plain


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [p for p in key.strip().split(".") if p]
    if not equals or not path:
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        value = _numeric(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error
    here = data
    for i, name in enumerate(path[:-1]):
        below = here.get(name)
        if name == "algorithm" and i == 0 and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(path[: i + 1])} is {below!r}, not a section")
        here[name] = here = dict(below)
    here[path[-1]] = value


def _numeric(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; whoever writes it means a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) and "e" in value.lower() else value
        except ValueError:
            return value
    if isinstance(value, list):
        return [_numeric(v) for v in value]
    return {k: _numeric(v) for k, v in value.items()} if isinstance(value, dict) else value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
