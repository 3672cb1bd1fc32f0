"""`tokenloom unslop`: a model that no longer begins what is banned, trained on its own corrected samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console, pairs, program, quiet_libraries
from tokenloom.cli.distill import built_in_prompts
from tokenloom.cli.guard import Interrupted, UsageError, guarded
from tokenloom.cli.models import load_policy, model_source
from tokenloom.cli.prompts import encoded, read_file, read_prompts

PAIRS = "pairs.jsonl"


@guarded
def unslop(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a built-in or a Hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trained model and its pairs.jsonl.")],
    ban: Annotated[list[str] | None, typer.Option("--ban", help="A phrase to ban; repeatable.")] = None,
    ban_file: Annotated[Path | None, typer.Option("--ban-file", help="Phrases to ban, one a line.")] = None,
    pairs_file: Annotated[
        Path | None, typer.Option("--pairs", help="Train on these pairs of an earlier call; nothing is sampled.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts from a .jsonl or .txt file; default: built-in ones.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 200,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train adapters of this rank; 0: all weights.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every pair is learned, at most.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 3e-5,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 16,
    balance: Annotated[
        float, typer.Option(min=0, max=1, help="How far to thin out tokens rejected more often than most; 0: not.")
    ] = 0.8,
    wins: Annotated[
        float, typer.Option(help="Stop once this share of the alternatives beats what was rejected; above 1: never.")
    ] = 0.85,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as text, without the chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same model.")] = 0,
) -> None:
    """Teach a model not to begin phrases that it overuses (Antislop's final-token preference optimization).

    The model answers prompts under the antislop sampler, which takes every banned phrase back to the token where it
    began. There the token that was rejected learns to lose against those that could stand instead; the logits of all
    others are held where they are. A tenth of the pairs is held out, and what changed on them is printed. The pairs
    are kept beside the model in pairs.jsonl, for other settings on the same samples.

    Examples:
      tokenloom unslop smollm2-135m-instruct --ban "a testament to" --ban tapestry --out plain-spoken
      tokenloom unslop my/model --ban-file slop.txt --prompts stories.txt --samples 4 --out better
      tokenloom unslop my/model --pairs better/pairs.jsonl --learning-rate 1e-5 --out gentler
    """
    phrases = [] if pairs_file is not None else _phrases(ban, ban_file)
    given = built_in_prompts() if prompts is None else read_prompts(None, prompts)
    if pairs_file is not None and not pairs_file.is_file():
        raise UsageError(f"there is no file {pairs_file}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a new folder")
    if out.is_dir() and any(path.name != PAIRS for path in out.iterdir()):
        raise UsageError(f"{out} holds something already; name a new folder")
    model_source(model)
    screen, notes = console(), console(stderr=True)
    quiet_libraries(notes)
    from tokenloom.cli.fit_progress import fit_progress
    from tokenloom.decode.antislop import Antislop
    from tokenloom.decode.ftpo import balanced, collect, fit_ftpo, read_pairs, write_pairs
    from tokenloom.policy import ModelConfig
    from tokenloom.policy.config import LoraSection

    adapters = LoraSection(rank=lora_rank) if lora_rank else None
    policy = load_policy(model, ModelConfig(lora=adapters), seed=seed)
    try:
        with fit_progress(notes) as report:
            if pairs_file is not None:
                found = read_pairs(pairs_file)
            else:
                ids = encoded(policy, given, raw=raw)
                found = collect(
                    policy, ids, Antislop(policy.tokenizer, phrases), copies=samples, max_tokens=max_tokens, seed=seed,
                    progress=lambda done, of, _: report("sampling", done, of, 0, None),
                )  # fmt: skip
            # Before training: sampling took longest, and --pairs goes on from here.
            if found:
                out.mkdir(parents=True, exist_ok=True)
                write_pairs(found, out / PAIRS, policy.tokenizer)
            used = balanced(found, strength=balance, seed=seed)
            held = used[len(used) - len(used) // 10 :]
            trained = fit_ftpo(
                policy.model, used[: len(used) - len(held)], held, learning_rate=learning_rate, epochs=epochs,
                batch=batch, wins=wins, seed=seed, progress=lambda d, n, loss: report("training", d, n, 0, loss),
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = out / PAIRS
        raise Interrupted(f"stopped; train on what was sampled with --pairs {kept}" if kept.is_file() else "") from None
    policy.save(out)
    before, after = trained.before, trained.after
    screen.print(f"Model in {out}", style="bold")
    pairs(
        screen,
        [
            (
                "pairs",
                f"{len(found):,}, {len(used):,} used, {len(held):,} of them held out; {len(trained.losses):,} steps",
            ),
            ("measured on", "held-out pairs" if held else "the pairs it learned: too few to hold some out"),
            ("rejected tokens", f"{after.rejected:.1%} of the probability, {before.rejected:.1%} before"),
            ("alternatives", f"{after.wins:.1%} beat the rejected token, {before.wins:.1%} before"),
            ("other logits", f"moved by {after.moved:.3f} (root mean square)"),
        ],
    )
    screen.print(f'Try: {program()} generate {out} "Tell a story."', style="dim")


def _phrases(ban: list[str] | None, file: Path | None) -> list[str]:
    lines = read_file(file).split("\n") if file is not None else []
    found = [*(phrase for phrase in ban or [] if phrase.strip()), *(line.strip() for line in lines if line.strip())]
    if not found:
        raise UsageError("nothing is banned: give phrases with --ban or --ban-file, or pairs with --pairs")
    return found
