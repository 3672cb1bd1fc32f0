"""`tokenloom recipes`: what is shipped, and how recipes are written."""

from __future__ import annotations

import json
from importlib import resources
from typing import Annotated

import typer

from tokenloom.cli.console import console, program, table
from tokenloom.cli.guard import UsageError, guarded


@guarded
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A recipe to print as YAML.")] = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With NAME: every key with its value, defaults filled in.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List the shipped recipes, or print one to copy and change.

    Examples:
      tokenloom recipes
      tokenloom recipes quickstart > my.yaml
      tokenloom recipes quickstart --resolved
      tokenloom recipes --schema > recipe.schema.json
    """
    from tokenloom.train.recipe import load_recipe, recipe_names, recipe_schema

    screen = console()
    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=2))
    elif name is not None:
        loaded = load_recipe(name, check_files=False)
        # A shipped recipe is printed as it was written, comments and all.
        written = not resolved and name in recipe_names()
        text = (
            (resources.files("tokenloom.recipes") / f"{name}.yaml").read_text("utf-8") if written else loaded.to_yaml()
        )
        typer.echo(text.rstrip())
    elif resolved:
        raise UsageError(f"--resolved needs the NAME of a recipe, one of: {', '.join(recipe_names())}")
    else:
        shown = table("recipe", "what for")
        for found, description in recipe_names().items():
            shown.add_row(found, description)
        screen.print(shown)
        screen.print(f"\nRun one: {program()} train NAME; see one: {program()} recipes NAME", style="dim")
