"""Training: recipes, the loop, checkpoints, evaluation."""

from __future__ import annotations

from tokenloom.train.errors import RecipeError, TrainingDiverged
from tokenloom.train.events import Observer, Silent
from tokenloom.train.loop import Outcome, Trainer
from tokenloom.train.recipe import Recipe, load_recipe, recipe_names, recipe_schema
from tokenloom.train.session import Session, train

__all__ = [
    "Observer",
    "Outcome",
    "Recipe",
    "RecipeError",
    "Session",
    "Silent",
    "Trainer",
    "TrainingDiverged",
    "load_recipe",
    "recipe_names",
    "recipe_schema",
    "train",
]
