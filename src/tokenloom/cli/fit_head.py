"""`tokenloom fit-head`: a reward or value head of a model, fitted to its own verified responses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokenloom.cli.answers_file import check_place
from tokenloom.cli.console import console, program, quiet_libraries
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import load_policy, model_source


@guarded
def fit_head(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    kind: Annotated[Literal["reward", "value"], typer.Option(help="reward: for rad. value: for rmod.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the head, ending in .safetensors.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Take the task from this recipe.")] = "quickstart",
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="KEY=VALUE", help="Set a key of the task; repeatable.")
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Problems to learn from; half as many held-out ones.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each problem.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response; default the recipe's.")] = None,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    seed: Annotated[int, typer.Option(help="Same seed, same head.")] = 0,
) -> None:
    """Fit a reward or value head to responses of the model that the task's verifier has judged.

    The model answers training problems of the task at temperature 1; a linear map of its last hidden state learns to
    predict the reward. On responses to held-out problems the area under the ROC curve (0.5 is chance) and the squared
    error beside that of the mean reward are printed, and kept beside the head. The file belongs to this model alone.

    Examples:
      tokenloom fit-head smollm2-135m-instruct --kind reward --out judge.safetensors
      tokenloom generate smollm2-135m-instruct "What is 7 + 8?" --sampler rad:reward=judge.safetensors
      tokenloom fit-head my/model --kind value --task source=problems.jsonl --out value.safetensors
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: a head is a file ending in .safetensors")
    check_place(out)
    from tokenloom.train.recipe import load_recipe

    chosen = load_recipe(recipe, [f"task.{text}" for text in task or []])
    model_source(model)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    from tokenloom.batch import Sampling
    from tokenloom.cli.fit_progress import fit_progress
    from tokenloom.decode.heads import USES, save_head
    from tokenloom.decode.heads import fit_head as fit
    from tokenloom.policy import ModelConfig
    from tokenloom.tasks import Verifier, load_task
    from tokenloom.train.respond import Responder

    items: Any = load_task(chosen.task)
    if items.environment is not None:
        raise UsageError("a head is fitted to single responses; this task has an environment of several turns")
    policy = load_policy(model, ModelConfig(autocast="bf16" if autocast else "none"))
    sampling = Sampling(1.0, max_tokens=max_tokens or chosen.rollout.max_tokens, stop=tuple(chosen.rollout.stop))
    sides = {"sampling": items.train[:problems], "sampling held-out": items.heldout[: max(1, problems // 2)]}
    with fit_progress(notes) as report, Verifier(chosen.task) as verifier:
        responder = Responder(policy, verifier, max_rows=64)
        training, heldout = (
            _judged(responder, some, sampling, samples, seed + i, lambda d, n, t, s=stage: report(s, d, n, t, None))
            for i, (stage, some) in enumerate(sides.items())
        )
        head, quality = fit(
            kind, policy, training, heldout, seed=seed, progress=lambda d, n, loss: report("fitting", d, n, 0, loss)
        )
    save_head(head, out, quality)
    screen.print(f"{out}, {quality.line()}", soft_wrap=True)
    screen.print(f"Try: {program()} generate {model} PROMPT --sampler {USES[kind].format(out)}", style="dim")


def _judged(responder: Any, items: Any, sampling: Any, copies: int, seed: int, report: Any) -> Any:
    """Responses without their end tokens, and whether they are right."""
    import torch

    from tokenloom.decode.heads import Judged

    generator = torch.Generator().manual_seed(seed)
    found = responder.respond(items, sampling, copies=copies, generator=generator, report=report)
    rollouts, ends = found.rollouts, responder.policy.eos_ids
    responses = [[t for t in rollouts.response(i).tolist() if t not in ends] for i in range(len(rollouts))]
    prompts = [p.tolist() for p in rollouts.prompt_tokens]
    return Judged(prompts, responses, rollouts.rewards.clamp(0, 1))
