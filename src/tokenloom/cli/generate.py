"""`tokenloom generate`: responses of a model to prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tokenloom.cli.console import console, interactive, quiet_libraries, visible
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.cli.models import model_source

if TYPE_CHECKING:
    from tokenloom.batch import Rollouts, Sampling

DEFAULT_TOKENS = 128
Prompt = str | list[dict[str, str]]


@guarded
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts from a .jsonl file (prompt or messages) or a .txt file, one a line."),
    ] = None,
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

    What the model writes is shown as text: control characters are made visible.

    Examples:
      tokenloom generate smollm2-135m-instruct "What is 7 + 8?"
      tokenloom generate runs/quickstart-001 "7 + 8 =" --temperature 0
      tokenloom generate my/model --prompts questions.jsonl -n 4 --seed 1 --out answers.jsonl
    """
    from tokenloom.batch import Sampling
    from tokenloom.rollout.sampler import check_sampling

    given = _prompts(prompt, prompts)
    sampling = Sampling(temperature, top_k, top_p, max_tokens or DEFAULT_TOKENS, tuple(stop or ()), seed)
    check_sampling(sampling)
    if raw and (system or any(not isinstance(p, str) for p in given)):
        raise UsageError("--raw continues plain text; it goes with neither --system nor chat messages")
    source = model_source(model)
    screen, notes = console(), console(stderr=True)
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    quiet_libraries(notes)
    rollouts, texts, seconds = _sample(source, given, sampling, n, system, raw, notes, max_tokens is None)
    lines = list(_lines(given, rollouts, texts))
    if out is not None:
        out.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8", newline="\n")
        notes.print(f"{len(lines)} responses in {out}")
    else:
        _show(given, lines, n, screen)
    tokens = int(rollouts.mask.sum())
    notes.print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tok/s, "
                f"seed {rollouts.sampling.seed}", style="dim")  # fmt: skip


def _sample(
    source: str, given: list[Prompt], sampling: Sampling, n: int, system: str | None, raw: bool, notes: Console,
    shorten: bool,
) -> tuple[Rollouts, list[str], float]:  # fmt: skip
    from tokenloom.cli.stage import stage_progress
    from tokenloom.policy import Policy
    from tokenloom.rollout import generate as sample
    from tokenloom.rollout.engine import model_positions

    policy = Policy.load(source)
    ids = [policy.encode_prompt(p if raw else _chat(p, system)) for p in given]
    positions = model_positions(policy)
    if shorten and positions is not None:
        # Nobody asked for the default length, so it gives way to a small model's limit.
        room = max(positions - max(len(i) for i in ids), 1)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    started = time.monotonic()
    with stage_progress(notes, "generating", show=interactive(notes)) as report:
        rollouts = sample(policy, ids, sampling, copies=n, progress=report, max_rows=64)
    rows = [rollouts.response(i).tolist() for i in range(len(rollouts))]
    texts: list[str] = policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return rollouts, texts, time.monotonic() - started


def _chat(prompt: Prompt, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ([{"role": "system", "content": system}] if system else []) + messages


def _lines(given: list[Prompt], rollouts: Rollouts, texts: list[str]) -> Iterator[dict[str, Any]]:
    for row, text in enumerate(texts):
        line: dict[str, Any] = {"prompt": given[int(rollouts.group_ids[row])], "response": text}
        line["tokens"] = int(rollouts.lengths[row])
        if rollouts.truncated is not None:
            line["truncated"] = bool(rollouts.truncated[row])
        if rollouts.sampler_logprobs is not None:
            line["logprob"] = round(float(rollouts.sampler_logprobs[row][rollouts.mask[row]].sum()), 4)
        yield line


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


def _prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    if (prompt is None) == (file is None):
        raise UsageError("give a PROMPT, or a file of them with --prompts; - as the PROMPT reads standard input")
    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise UsageError("the prompt is empty")
        return [text]
    assert file is not None
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    lines = [x for x in file.read_text(encoding="utf-8-sig").split("\n") if x.strip()]
    if not lines:
        raise UsageError(f"{file} holds no prompts")
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return [x.rstrip("\r") for x in lines]
    return [_record(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)]


def _record(line: str, where: str) -> Prompt:
    from tokenloom.tasks import Item

    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("expected an object")
        item = Item(messages=record.get("messages"), prompt=record.get("prompt"))
    except ValueError as error:
        raise UsageError(f'{where}: {error}; a line is {{"prompt": "..."}} or {{"messages": [...]}}') from None
    return list(item.messages) if item.messages is not None else item.prompt or ""
