"""`tokenloom generate`: responses of a model to prompts, under any decoding methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tokenloom.cli.console import console, interactive, quiet_libraries, visible
from tokenloom.cli.decoding import CONSTRAINT_HELP, check_names, constraint_note, decoding_of, read_constraint
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source
from tokenloom.cli.prompts import Prompt, chat, read_prompts

if TYPE_CHECKING:
    from tokenloom.batch import Sampling
    from tokenloom.decode.constraints import Written

DEFAULT_TOKENS = 128
Show = Callable[[str], None]


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
            help="Decoding methods, in order: NAME or NAME:key=value,key=value; "
            "repeatable, or joined with +. See: tokenloom methods --family decoding.",
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option("--draft", help="Draft several tokens a step by this method; the law stays the same.")
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
        Path | None, typer.Option("--out", "-o", help="Write JSON lines: prompt, response, tokens, log-prob.")
    ] = None,
) -> None:
    """Let a model answer prompts.

    What the model writes is shown as text: control characters are made visible. A single response appears while it is
    written. --temperature comes before the methods of --sampler, --top-k and --top-p behind it. Under --constraint the
    lines of --out say whether a response is fulfilled, unfinished (cut by --max-tokens) or failed (its beginning).

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

    given = read_prompts(prompt, prompts)
    sampling = Sampling(temperature, top_k, top_p, max_tokens or DEFAULT_TOKENS, tuple(stop or ()), seed)
    check_sampling(sampling)
    if raw and (system or any(not isinstance(p, str) for p in given)):
        raise UsageError("--raw continues plain text; it goes with neither --system nor chat messages")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    if (sampler or draft or constraint) and stop:
        raise UsageError("--stop goes with neither --sampler nor --draft nor --constraint")
    source = model_source(model)
    methods = "+".join(sampler or ())
    required = read_constraint(constraint)
    decodes = bool(methods or draft or required)
    if decodes:
        check_names(methods, draft, constrained=required is not None)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    asked = _Asked(source, given, sampling, n, system, raw, shorten=max_tokens is None)
    streams = out is None and n == 1 and len(given) == 1 and interactive(screen)

    def show(piece: str) -> None:
        screen.print(Text(visible(piece)), end="", soft_wrap=True)

    told = show if streams else None
    answer = _decoded(asked, methods, draft, required, notes, told) if decodes else _sampled(asked, notes, told)
    if out is not None:
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in answer.lines)
        out.write_text(text, encoding="utf-8", newline="\n")
        notes.print(f"{len(answer.lines)} responses in {out}")
    elif streams:
        screen.print()
    else:
        _show(given, answer.lines, n, screen)
    tokens = sum(line["tokens"] for line in answer.lines)
    speed = f"{tokens:,} tokens in {answer.seconds:.1f} s, {tokens / max(answer.seconds, 1e-9):,.0f} tok/s"
    notes.print(", ".join([speed, *answer.notes, f"seed {answer.seed}"]), style="dim")
    if answer.warning:
        notes.print(answer.warning, style="yellow")


@dataclass(frozen=True)
class _Asked:
    source: str
    prompts: list[Prompt]
    sampling: Sampling
    copies: int
    system: str | None
    raw: bool
    shorten: bool

    def load(self) -> tuple[Any, list[list[int]], Sampling]:
        """The policy, the prompts' ids, and the sampling at a length that fits the model."""
        from tokenloom.policy import Policy
        from tokenloom.rollout.engine import model_positions

        policy = Policy.load(self.source)
        encoded = [policy.encode_prompt(p if self.raw else chat(p, self.system)).tolist() for p in self.prompts]
        positions = model_positions(policy)
        if not self.shorten or positions is None:
            return policy, encoded, self.sampling
        # Nobody asked for the default length, so it gives way to a small model's limit.
        room = max(positions - max(len(i) for i in encoded), 1)
        return policy, encoded, replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))


@dataclass
class _Answer:
    lines: list[dict[str, Any]]
    seconds: float
    seed: int | None
    notes: list[str]
    warning: str = ""


def _sampled(asked: _Asked, notes: Console, show: Show | None) -> _Answer:
    """By the engine that rollouts use."""
    import time

    from tokenloom.cli.stage import stage_progress
    from tokenloom.decode.respond import text_pieces
    from tokenloom.rollout import generate as sample

    policy, ids, sampling = asked.load()
    piece = text_pieces(policy.tokenizer)
    started = time.monotonic()
    with stage_progress(notes, "generating", show=interactive(notes) and show is None) as report:
        rollouts = sample(
            policy, ids, sampling, copies=asked.copies, progress=report, max_rows=64,
            on_tokens=None if show is None else lambda _row, new: show(piece(new)),
        )  # fmt: skip
    seconds = time.monotonic() - started
    rows = [rollouts.response(i).tolist() for i in range(len(rollouts))]
    lines = []
    for row, text in enumerate(policy.tokenizer.batch_decode(rows, skip_special_tokens=True)):
        line = {"prompt": asked.prompts[int(rollouts.group_ids[row])], "response": text, "tokens": len(rows[row])}
        if rollouts.truncated is not None:
            line["truncated"] = bool(rollouts.truncated[row])
        if rollouts.sampler_logprobs is not None:
            line["logprob"] = round(float(rollouts.sampler_logprobs[row][rollouts.mask[row]].sum()), 4)
        lines.append(line)
    return _Answer(lines, seconds, rollouts.sampling.seed if rollouts.sampling else None, [])


def _decoded(
    asked: _Asked, methods: str, draft: str | None, constraint: Written | None, notes: Console, show: Show | None
) -> _Answer:
    """By the loops and processors of `decode`."""
    import torch

    from tokenloom.cli.stage import stage_progress
    from tokenloom.decode.respond import respond, text_pieces

    policy, ids, sampling = asked.load()
    decoding = decoding_of(policy, methods, draft, sampling, constraint)
    seed = int(torch.randint(2**31, ())) if sampling.seed is None else sampling.seed
    piece, shown = text_pieces(policy.tokenizer), False

    def stream(new: list[int]) -> None:
        nonlocal shown
        shown = True
        if show is not None:
            show(piece(new))

    with stage_progress(notes, "generating", show=interactive(notes) and show is None) as report:
        found = respond(
            policy, ids, decoding, copies=asked.copies, seed=seed, progress=report,
            on_tokens=None if show is None else stream,
        )  # fmt: skip
    lines = []
    for a in found.answers:
        text = policy.tokenizer.decode(a.ids, skip_special_tokens=True)
        line = {"prompt": asked.prompts[a.prompt], "response": text, "tokens": len(a.ids), "truncated": a.truncated}
        judged = {} if a.standing is None else {"constraint": a.standing}
        lines.append({**line, "logprob": round(a.logprob * len(a.ids), 4), **judged})
    if show is not None and not shown:  # loops that decide late do not stream
        show(lines[0]["response"])
    counts = found.counts
    extra = []
    if "kept" in counts:
        extra.append(f"{counts['kept']:,.1f} words left to choose from")
    if counts.get("drafted"):
        extra.append(f"{found.tokens / max(counts.get('forwards', 1), 1):.2f} tokens a forward")
    return _Answer(lines, found.seconds, seed, extra, constraint_note(found, sampling.max_tokens))


def _show(given: list[Prompt], lines: list[dict[str, Any]], n: int, out: Console) -> None:
    from tokenloom.report.text import prompt_text

    for row, line in enumerate(lines):
        if len(given) > 1 and row % n == 0:
            out.print(Text(visible(prompt_text(line["prompt"])), style="bold"), soft_wrap=True)
        if n > 1:
            out.print(f"[{row % n + 1}] ", style="cyan", end="")
        out.print(Text(visible(line["response"])), soft_wrap=True)
        if len(lines) > 1 and row % n == n - 1:
            out.print()
