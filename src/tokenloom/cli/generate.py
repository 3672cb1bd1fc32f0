"""`tokenloom generate`: responses of a model to prompts, under any decoding methods."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from tokenloom.cli.answering import Answers, Asked, Decoded, Sampled
from tokenloom.cli.answers_file import AnswersFile, Line, check_place
from tokenloom.cli.console import console, interactive, quiet_libraries, visible
from tokenloom.cli.decoding import CONSTRAINT_HELP, constraint_note, named, read_constraint
from tokenloom.cli.guard import Interrupted, UsageError, guarded
from tokenloom.cli.models import model_source
from tokenloom.cli.prompts import Question, read_questions

if TYPE_CHECKING:
    from tokenloom.batch import Sampling

DEFAULT_TOKENS = 128
Keep = Callable[[list[Line]], None]


@guarded
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts from a .jsonl file (prompt or messages) or a .txt file, one a line."),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler",
            "-s",
            metavar="METHOD",
            help="Decoding methods, in order: NAME or NAME:key=value,key=value; "
            "repeatable, or joined with +. See: tokenloom methods --family decoding.",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="METHOD",
            help="Draft several tokens a step; the law stays the same. token-recycling, stand, prompt-lookup, "
            "speculative-sampling:draft=MODEL, speculative:drafter=NAME,verifier=NAME and others.",
        ),
    ] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", metavar="KIND=VALUE", help=CONSTRAINT_HELP)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response, in tokens; default 128.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0001, max=1, help="Sample from the fewest tokens with so much.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: from all.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Responses to each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same responses; default: a new one.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="System message put before each prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write JSON lines: id, prompt, response, tokens, truncated, log-prob."),
    ] = None,
) -> None:
    """Let a model answer prompts.

    What the model writes is shown as text: control characters are made visible. A single response appears while it is
    written. --temperature comes before the methods of --sampler, --top-k and --top-p behind it. Under --constraint the
    lines of --out say whether a response is fulfilled, unfinished (cut by --max-tokens) or failed (its beginning).
    Until all are there they stand in FILE.part; after an interruption the same command goes on from them.

    Examples:
      tokenloom generate smollm2-135m-instruct "What is 7 + 8?"
      tokenloom generate runs/quickstart-001 "7 + 8 =" --temperature 0
      tokenloom generate smollm2-135m-instruct "Tell a story." --sampler top-h:alpha=0.4
      tokenloom generate smollm2-135m-instruct "Count to fifty." --temperature 0 --draft token-recycling
      tokenloom generate smollm2-135m-instruct "Name a year." --constraint 'regex=(19|20)[0-9]{2}'
      tokenloom generate smollm2-135m-instruct "A pet:" --constraint json-schema=@pet.json --sampler awrs
      tokenloom generate my/model --prompts questions.jsonl -n 4 --seed 1 --out answers.jsonl
    """  # fmt: skip
    from tokenloom.batch import Sampling
    from tokenloom.rollout.sampler import check_sampling

    given = read_questions(prompt, prompts)
    sampling = Sampling(temperature, top_k, top_p, max_tokens or DEFAULT_TOKENS, tuple(stop or ()), seed)
    _check(check_sampling, sampling)
    if raw and (system or any(not isinstance(q.prompt, str) for q in given)):
        raise UsageError("--raw continues plain text; it goes with neither --system nor chat messages")
    check_place(out, prompts)
    if "" in (draft, *(s.strip() for s in sampler or ())):
        raise UsageError("--sampler and --draft take a method's name; leave them out for none")
    if (sampler or draft or constraint) and stop:
        raise UsageError("--stop goes with neither --sampler nor --draft nor --constraint")
    model_source(model)
    methods = "+".join(sampler or ())
    required = read_constraint(constraint)
    decodes = bool(methods or draft or required)
    if decodes:
        named(methods, draft, constrained=required is not None)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    file = None
    if out is not None:
        settings = {
            "model": model, "prompts": _digest(given), "--sampler": methods, "--draft": draft,
            "--constraint": _written(constraint), "--max-tokens": max_tokens, "--temperature": temperature,
            "--top-p": top_p, "--top-k": top_k, "-n": n, "--stop": stop, "--system": system, "--raw": raw,
        }  # fmt: skip
        file = AnswersFile(out, settings, seed)
    chosen = file.seed if file is not None else secrets.randbelow(2**31) if seed is None else seed
    asked = Asked(model, given, replace(sampling, seed=chosen), n, system, raw, shorten=max_tokens is None)
    streams = out is None and n == 1 and len(given) == 1 and interactive(screen)
    # A pipe gets answers as they come; on a terminal the line of progress is in their way.
    flows = out is None and not interactive(screen)
    several = len(given) > 1
    try:
        answers = Decoded(asked, methods, draft, required) if decodes else Sampled(asked)
        keep = file.add if file is not None else (lambda new: _show(new, n, several, screen)) if flows else None
        lines = _answered(answers, file, notes, screen if streams else None, keep)
    except KeyboardInterrupt:
        if streams:
            screen.print()
        raise Interrupted(_left(file)) from None
    finally:
        if file is not None:
            file.leave()
    if file is not None:
        file.finish()
        notes.print(f"{len(lines)} response{'s' if len(lines) > 1 else ''} in {out}")
    elif streams:
        screen.print()
    elif not flows:
        _show(lines, n, several, screen)
    speed = f"{answers.tokens:,} tokens in {answers.seconds:.1f} s"
    if answers.tokens:
        speed += f", {answers.tokens / max(answers.seconds, 1e-9):,.0f} tok/s"
    notes.print(", ".join([speed, *answers.notes(), f"seed {chosen}"]), style="dim")
    if warning := constraint_note([line.get("constraint") for line in lines], answers.sampling.max_tokens):
        notes.print(warning, style="yellow")


def _answered(
    answers: Answers, file: AnswersFile | None, notes: Console, screen: Console | None, keep: Keep | None
) -> list[Line]:
    """All answers, those of an interrupted call first; `keep` is told the new ones when some prompts are done."""
    from tokenloom.cli.stage import stage_progress

    n, prompts = answers.asked.copies, len(answers.ids)
    step = answers.together
    done: list[Line] = []
    begin = 0
    if file is not None and file.lines:
        # Only whole steps: what a step samples depends on all that is in it.
        begin = prompts if len(file.lines) >= prompts * n else len(file.lines) // (step * n) * step
        file.keep(begin * n)
        done = list(file.lines)
        notes.print(f"{len(done)} of {prompts * n} responses were there already", style="dim")

    def show(piece: str) -> None:
        assert screen is not None
        screen.print(Text(visible(piece)), end="", soft_wrap=True)

    visible_progress = interactive(notes) and screen is None
    with answers.ready(), stage_progress(notes, "generating", show=visible_progress) as report:
        for first in range(begin, prompts, step):
            behind, tokens = len(done), answers.tokens
            new = answers.lines(
                first,
                lambda some, _all, more, b=behind, t=tokens: report(b + some, prompts * n, t + more),  # type: ignore[misc]  # defaults bind
                None if screen is None else show,
            )
            done += new
            if keep is not None:
                keep(new)
    return done


def _left(file: AnswersFile | None) -> str:
    if file is None or not file.lines or not file.part.is_file():
        return ""
    return f"stopped; the same command goes on from the {len(file.lines)} responses in {file.part}"


def _digest(given: list[Question]) -> str:
    return hashlib.sha256(json.dumps([[q.id, q.prompt] for q in given]).encode()).hexdigest()


def _written(constraint: str | None) -> str | None:
    """A constraint with what its file holds now."""
    value = (constraint or "").partition("=")[2]
    if not value.startswith("@"):
        return constraint
    return f"{constraint} {hashlib.sha256(Path(value[1:]).read_bytes()).hexdigest()}"


def _check(check: Callable[[Sampling], None], sampling: Sampling) -> None:
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise UsageError(f"--seed {sampling.seed} is too large; a seed has at most 63 bits")
    try:
        check(sampling)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _show(lines: list[Line], n: int, several: bool, out: Console) -> None:
    """Answers, `n` to a prompt; the prompts too if there are several."""
    from tokenloom.report.text import prompt_text

    for row, line in enumerate(lines):
        if several and row % n == 0:
            out.print(Text(visible(prompt_text(line["prompt"])), style="bold"), soft_wrap=True)
        if n > 1:
            out.print(f"[{row % n + 1}] ", style="cyan", end="")
        out.print(Text(visible(line["response"])), soft_wrap=True)
        if (several or n > 1) and row % n == n - 1:
            out.print()
