"""`tokenloom eval`: held-out accuracy with intervals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tokenloom.cli.console import console, interactive, quiet_libraries, table
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source, run_of

if TYPE_CHECKING:
    from tokenloom.train.evaluate import Evaluation
    from tokenloom.train.recipe import Recipe


@guarded
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Take the task from this recipe.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="KEY=VALUE", help="Set a key of the task; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Responses sampled for each problem; 0: greedy only.")] = 8,
    k: Annotated[str, typer.Option("--k", help="pass@k for these k, separated by commas.")] = "",
    problems: Annotated[int | None, typer.Option(min=1, help="Use only so many held-out problems.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response; default the recipe's.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Of the sampled responses.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled responses.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on the held-out problems of a task: greedy, sampled, pass@k, with 95 % intervals.

    A run brings its own task; a model takes it from --recipe, from --task keys, or from both. Intervals: Wilson's
    for greedy answers, a bootstrap over problems for the others.

    Examples:
      tokenloom eval runs/quickstart-001 --samples 16 --k 1,4,8
      tokenloom eval smollm2-135m-instruct --recipe quickstart
      tokenloom eval my/model --task source=problems.jsonl --task heldout=200 --json
    """
    wanted = _ks(k, samples)
    chosen = _recipe(model, recipe, task or [])
    source = model_source(model)
    screen = console(stderr=as_json)
    result = _measure(chosen, source, screen, samples=samples, problems=problems, max_tokens=max_tokens,
                      temperature=temperature, seed=seed)  # fmt: skip
    rows = measures(result, wanted)
    if as_json:
        head = {"model": model, "problems": result.problems, "samples": result.samples}
        typer.echo(json.dumps(head | {n: {"value": v, "low": a, "high": b} for n, (v, a, b) in rows.items()}))
        return
    shown = table("measure", "value", "95 % interval", right=("value",))
    for name, (value, low, high) in rows.items():
        shown.add_row(name, f"{value:.1%}", f"{low:.1%} to {high:.1%}")
    screen.print(shown)
    screen.print(f"{result.problems} held-out problems, {result.samples} samples each", style="dim")


def measures(result: Evaluation, ks: list[int]) -> dict[str, tuple[float, float, float]]:
    """Value, low and high end of each measure."""
    from tokenloom.train.evaluate import bootstrap, pass_at_k, wilson

    rows = {"greedy": (result.greedy, *wilson(result.greedy, result.problems))}
    if result.sampled is not None:
        shares = [c / result.samples for c in result.correct]
        rows["sampled"] = (result.sampled, *bootstrap(shares))
    for n in ks:
        each = [pass_at_k([c], result.samples, n) for c in result.correct]
        rows[f"pass@{n}"] = (pass_at_k(result.correct, result.samples, n), *bootstrap(each))
    return rows


def _ks(text: str, samples: int) -> list[int]:
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not all(p.isdecimal() and int(p) >= 1 for p in parts):
        raise UsageError(f"--k {text!r} is not a list of positive whole numbers such as 1,4,8")
    ks = sorted({int(p) for p in parts})
    if ks and ks[-1] > samples:
        raise UsageError(f"pass@{ks[-1]} needs at least {ks[-1]} samples of each problem: add --samples {ks[-1]}")
    return ks


def _recipe(model: str, recipe: str | None, task: list[str]) -> Recipe:
    from tokenloom.catalog import presets
    from tokenloom.train.recipe import build_recipe, load_recipe

    for text in task:
        if "=" not in text:
            raise UsageError(f"--task {text!r} is not of the form key=value, for example --task source=problems.jsonl")
    changes = [f"task.{text}" for text in task]
    source = recipe if recipe is not None else run_of(model)
    if source is not None:
        return load_recipe(source, changes)
    if not changes:
        raise UsageError(
            f"which task? {model} is not a run, so name a recipe (--recipe quickstart) or a source (--task source=...)"
        )
    # Evaluating takes no algorithm, but a recipe does: any will do.
    return build_recipe({"task": _task(task), "algorithm": min(presets())}, "--task")


def _task(pairs: list[str]) -> dict[str, Any]:
    """A task section of key=value pairs, keys dotted, values YAML."""
    from tokenloom.train.plain import read_yaml

    section: dict[str, Any] = {}
    for text in pairs:
        key, _, value = text.partition("=")
        *path, last = key.split(".")
        here = section
        for name in path:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                raise UsageError(f"--task {text!r}: {name} is set to a value already and has no keys")
        here[last] = read_yaml(value, f"--task {text!r}")
    return section


def _measure(
    recipe: Recipe, source: str, screen: Console, *, samples: int, problems: int | None, max_tokens: int | None,
    temperature: float | None, seed: int,
) -> Evaluation:  # fmt: skip
    from tokenloom.cli.stage import stage_progress

    quiet_libraries(screen)
    from tokenloom.policy import Policy
    from tokenloom.tasks import Verifier, load_task
    from tokenloom.train.evaluate import evaluate as run
    from tokenloom.train.respond import Responder

    items: Any = load_task(recipe.task)
    plain = recipe.model.model_copy(update={"lora": None, "value_head": None})
    policy = Policy.load(source, plain)
    rows = recipe.rollout.max_rows or max(64, recipe.rollout.prompts_per_step * recipe.rollout.group_size)
    with Verifier(recipe.task) as verifier, stage_progress(screen, "evaluating", show=interactive(screen)) as report:
        return run(
            Responder(policy, verifier, environment=items.environment, max_rows=rows),
            items.heldout[:problems],
            max_tokens=max_tokens or recipe.rollout.max_tokens,
            samples=samples,
            temperature=temperature or recipe.train.eval.temperature,
            stop=recipe.rollout.stop,
            seed=seed,
            report=report,
        )
