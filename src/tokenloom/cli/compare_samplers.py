"""`tokenloom compare-samplers`: the same prompts under several decoding methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokenloom.cli.console import console, interactive, quiet_libraries, table, visible
from tokenloom.cli.decoding import CONSTRAINT_HELP, check_names, decoding_of, read_constraint
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source
from tokenloom.cli.prompts import chat, read_prompts


@guarded
def compare_samplers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    methods: Annotated[
        list[str], typer.Argument(metavar="METHODS...", help="NAME:key=value,...; several that belong together by +.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Prompts from a .jsonl or .txt file.")] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", metavar="KIND=VALUE", help=CONSTRAINT_HELP)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Responses to each prompt under each method.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Before every method; 0: most probable token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same responses.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompts as text.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page (.html) to look at them.")] = None,
) -> None:
    """Show what decoding methods do to the same prompts: diversity, repetition, log-prob, length, speed.

    `plain` is sampling with nothing else. With --out the responses stand side by side in one HTML file.

    Examples:
      tokenloom compare-samplers smollm2-135m-instruct plain top-p:p=0.9 top-h min-p --prompt "Tell me a story."
      tokenloom compare-samplers my/model plain awrs --constraint 'regex=[0-9]{4}' --prompt "Name a year."
      tokenloom compare-samplers my/model plain cntp best-of-n --prompts questions.txt --out samplers.html
    """
    from tokenloom.batch import Sampling
    from tokenloom.cli.stage import stage_progress
    from tokenloom.decode.respond import respond
    from tokenloom.policy import Policy
    from tokenloom.report.samplers import Column, measured, write_samplers
    from tokenloom.report.text import prompt_text

    given = read_prompts(prompt, prompts)
    if len(set(methods)) != len(methods):
        raise UsageError("a method is named twice")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    required = read_constraint(constraint)
    for text in methods:
        check_names(text, constrained=required is not None)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    policy = Policy.load(model_source(model))
    ids = [policy.encode_prompt(p if raw else chat(p)).tolist() for p in given]
    columns = []
    for text in methods:
        decoding = decoding_of(policy, text, None, Sampling(temperature, max_tokens=max_tokens), required)
        with stage_progress(notes, text, show=interactive(notes)) as report:
            columns.append(Column(text, respond(policy, ids, decoding, copies=n, seed=seed, progress=report)))
    judged = ("fulfilled",) if required is not None else ()
    shown = table("method", "distinct 2-grams", "repeated 4-grams", "log-prob a token", "tokens", "tok/s", *judged)
    for column in columns:
        m = measured(column)
        shown.add_row(
            Text(visible(column.name)), f"{m.distinct:.2f}", f"{m.repeated:.2f}", f"{m.logprob:.2f}", f"{m.length:.0f}",
            f"{m.speed:,.0f}", *([f"{m.fulfilled:.0%}"] if required is not None else ()),
        )  # fmt: skip
    screen.print(shown)
    screen.print(
        "distinct: of all 2-grams of the responses to a prompt; repeated: 4-grams that a response had before; "
        "log-prob in nats under the model alone",
        style="dim",
    )
    if out is not None:
        texts = [prompt_text(p) for p in given]
        write_samplers(out, model, texts, columns, lambda x: policy.tokenizer.decode(x, skip_special_tokens=True))
        notes.print(f"side by side in {out}")
