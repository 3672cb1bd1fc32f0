"""`tokenloom distill`: a shallow student of a model, for methods that need a smaller one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console, pairs, program, quiet_libraries
from tokenloom.cli.guard import Interrupted, guarded
from tokenloom.cli.models import load_policy
from tokenloom.cli.prompts import Prompt, encoded, read_prompts


@guarded
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A run, a model folder, a built-in or a Hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student; repeat the call to go on.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers that the student keeps, evenly spaced.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample from the teacher.")] = 60_000,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts from a .jsonl or .txt file; default: built-in ones.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that the student reads the samples.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest sample, in tokens.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="Highest one, of AdamW.")] = 1e-3,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as text, without the chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same student.")] = 0,
) -> None:
    """Distill a shallow student from a model: a draft or an amateur for methods that need a second one.

    The teacher answers prompts at temperature 1. The student, a few of its layers under its own embeddings and head,
    learns to give the same laws: KL divergence over the whole vocabulary. A tenth of the prompts is held out, and what
    the student is worth there is printed, kept in quality.json, and shown again wherever the student is used. An
    interrupted call goes on where it stopped when it is repeated. Use prompts like those that you will decode.

    Examples:
      tokenloom distill smollm2-135m-instruct --out students/six
      tokenloom distill my/model --layers 4 --tokens 500000 --prompts mine.jsonl --out students/four
      tokenloom generate smollm2-135m-instruct "Tell a story." --draft speculative-sampling:draft=students/six
      tokenloom generate smollm2-135m-instruct "Tell a story." --sampler contrastive-decoding:amateur=students/six
    """
    from tokenloom.cli.fit_progress import fit_progress

    given = built_in_prompts() if prompts is None else read_prompts(None, prompts)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    from tokenloom.decode.student import Settings
    from tokenloom.decode.student import distill as run
    from tokenloom.policy import ModelConfig

    settings = Settings(layers, tokens, max_tokens, epochs, batch, learning_rate, seed)
    policy = load_policy(teacher, ModelConfig(autocast="bf16" if autocast else "none"))
    ids = encoded(policy, given, raw=raw)
    try:
        with fit_progress(notes) as report:
            found = run(policy, ids, out, settings, name=teacher, report=report)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command goes on from what is in {out}") from None
    screen.print(f"Student in {out}: layers {', '.join(map(str, found.layers))} of {teacher}", style="bold")
    pairs(
        screen,
        [
            ("KL", f"{found.kl:.3f} nats a token, of the teacher's law over the student's"),
            ("same best token", f"{found.agreement:.1%}"),
            ("acceptance", f"{found.acceptance:.1%} of drafts at temperature 1"),
            ("a round", f"{found.round_tokens:.2f} tokens expected of {found.drafts} drafts"),
            ("measured on", f"{found.heldout_tokens:,} tokens of held-out prompts; {found.training_tokens:,} learned"),
        ],
    )
    screen.print(f'Try: {program()} generate {teacher} "Hello!" --draft speculative-sampling:draft={out}', style="dim")


def built_in_prompts() -> list[Prompt]:
    """Short instructions of many kinds."""
    text = resources.files("tokenloom.recipes").joinpath("instructions.txt").read_text(encoding="utf-8")
    return list(text.splitlines())
