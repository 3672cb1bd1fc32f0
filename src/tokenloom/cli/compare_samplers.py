"""`tokenloom compare-samplers`: the same prompts under several decoding methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokenloom.cli.answers_file import check_place
from tokenloom.cli.console import console, interactive, quiet_libraries, table, visible
from tokenloom.cli.decoding import CONSTRAINT_HELP, decoding_of, named, read_constraint
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import load_policy
from tokenloom.cli.prompts import encoded, read_prompts, room


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
    from tokenloom.decode.respond import Decoding, respond
    from tokenloom.report.samplers import LEGEND, Column, headings, measured, write_samplers
    from tokenloom.report.text import prompt_text

    given = read_prompts(prompt, prompts)
    if len(set(methods)) != len(methods):
        raise UsageError("a method is named twice")
    check_place(out, prompts)
    required = read_constraint(constraint)
    for text in methods:
        named(text, constrained=required is not None)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    policy = load_policy(model)
    ids = encoded(policy, given, raw=raw)
    room(policy, ids, max_tokens)
    # The first call of a process is slower than the ones behind it.
    respond(policy, ids[:1], Decoding(max_tokens=2))
    columns = []
    for text in methods:
        decoding = decoding_of(policy, text, None, Sampling(temperature, max_tokens=max_tokens), required)
        with stage_progress(notes, text, show=interactive(notes)) as report:
            try:
                found = respond(policy, ids, decoding, copies=n, seed=seed, progress=report)
            except ValueError as error:  # a loop refuses what it is given
                raise UsageError(f"{text}: {error}") from None
        columns.append(Column(text, found))
    judged = required is not None
    shown = table(*headings(judged))
    for column in columns:
        shown.add_row(Text(visible(column.name)), *measured(column).cells(judged))
    screen.print(shown)
    screen.print(LEGEND, style="dim")
    if out is not None:
        texts = [prompt_text(p) for p in given]
        settings = (
            f"{n} responses to each prompt, of at most {max_tokens} tokens; temperature {temperature:g}, seed {seed}"
        )
        if constraint is not None:
            settings += f"; {constraint}"
        write_samplers(
            out, f"{model}: {settings}", texts, columns,
            lambda x: policy.tokenizer.decode(x, skip_special_tokens=True), judged=judged,
        )  # fmt: skip
        notes.print(f"side by side in {out}")
