"""What a run is, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tokenloom.cli.console import count, pairs

if TYPE_CHECKING:
    from tokenloom.train.recipe import Recipe


def print_plan(recipe: Recipe, run: Path | None, out: Console) -> None:
    """Print model, task, algorithm and sizes as the recipe says them; nothing is loaded for it."""
    out.print(Text(recipe.name, style="bold").append(f"  {recipe.description}", style="default not bold"))
    algorithm = recipe.build_algorithm()
    rows: list[tuple[str, str | Text]] = [] if run is None else [("run", str(run))]
    rows += [
        ("model", model_text(recipe)),
        ("task", task_text(recipe)),
        ("each step", step_text(recipe)),
        ("training", training_text(recipe)),
        ("algorithm", Text(algorithm.preset, style="bold")),
    ]
    pairs(out, rows)
    pairs(out, [_part(line) for line in algorithm.describe()], indent=6)


def model_text(recipe: Recipe) -> str:
    """The model and how it is trained."""
    model = recipe.model
    text = model.name
    text += f", adapters of rank {model.lora.rank}" if model.lora else ", all weights trained"
    text += f", {model.dtype}" + (" with bf16 autocast" if model.autocast == "bf16" else "")
    text += ", gradient checkpointing" if model.gradient_checkpointing else ""
    return text + (", with a value head" if model.value_head else "")


def task_text(recipe: Recipe) -> str:
    """Sources and rewards."""
    task = recipe.task
    sources = " + ".join(
        s.source + (f" ({', '.join(f'{k} {v}' for k, v in s.params.items())})" if s.params else "")
        for s in task.all_sources
    )
    if task.environment:
        return f"{sources}; environment {task.environment}"
    rewards = task.all_rewards
    scored = " + ".join((f"{r.weight:g} x " if len(rewards) > 1 else "") + r.verifier for r in rewards)
    return f"{sources}; scored by {scored}" + ("; easiest first" if task.curriculum else "")


def step_text(recipe: Recipe) -> str:
    """The sizes of a step."""
    r = recipe.rollout
    text = f"{r.prompts_per_step} prompts x {r.group_size} responses of at most {r.max_tokens} tokens"
    text += f", temperature {r.temperature:g}"
    text += f", top-k {r.top_k}" if r.top_k else ""
    return text + (f", top-p {r.top_p:g}" if r.top_p < 1 else "")


def training_text(recipe: Recipe) -> str:
    """Steps, rate and evaluations."""
    t = recipe.train
    rate = f"learning rate {t.learning_rate:g}"
    rate += "" if t.schedule == "constant" else f" ({t.schedule})"
    every = f"every {t.eval.every} steps" if t.eval.every else "before and after"
    return f"{t.steps} steps, {rate}, seed {t.seed}; held-out evaluation {every}"


def print_model(policy: Any, out: Console) -> None:
    """Print how large the loaded model is and where it lies."""
    total = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for _, p in policy.trainable_parameters())
    part = "all" if trained == total else count(trained)
    out.print(f"{count(total)} parameters, {part} of them trained, on {policy.device}", style="dim")


def _part(line: str) -> tuple[str, str | Text]:
    stage, _, rest = line.partition(" ")
    body, bracket, paper = rest.strip().rpartition("  [")
    return (stage, Text(body).append(f"  {paper.removesuffix(']')}", style="dim")) if bracket else (stage, rest.strip())
