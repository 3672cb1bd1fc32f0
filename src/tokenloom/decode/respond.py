"""Responses of a model under decoding methods, with what they cost and what the methods did.

One door for the command line and for comparisons: prompts of any length go through `generate` in batches, whatever the
loop, and come back as records.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tokenloom.decode.constraints.masks import Masks, Standing, standing
from tokenloom.decode.registry import loop as loop_named
from tokenloom.decode.run import Loop
from tokenloom.draw import RandomDraw
from tokenloom.rollout.contexts import sampling_mode
from tokenloom.rollout.forward import left_padded

OnTokens = Callable[[list[int]], None]


@dataclass
class Decoding:
    """What a decode is made of: processors in order, and a loop (default: one token per step).

    A `constraint` masks tokens before all processors, unless the loop was given one of its own, which then counts.
    """

    shapers: Sequence[Any] = ()
    loop: Loop = field(default_factory=lambda: loop_named("plain"))
    sample: bool = True
    max_tokens: int = 128
    batch: int = 16
    """Most rows that decode together."""
    constraint: Any = None

    @property
    def held(self) -> Any:
        """The constraint that responses are judged by, if there is one."""
        own = getattr(self.loop, "constraint", None)
        return self.constraint if own is None else own


@dataclass(frozen=True)
class Answer:
    """One response: its prompt's number, ids, mean log-prob of a token under the model alone (nats).

    Under a constraint the ids are those that it allows; a response whose `standing` is "failed" has weight 0.
    """

    prompt: int
    ids: list[int]
    logprob: float
    truncated: bool
    standing: Standing | None = None


@dataclass
class Responses:
    """All answers, the seconds of decoding alone, and what was counted: `forwards`, `accepted`, `kept`, ..."""

    answers: list[Answer]
    seconds: float
    counts: dict[str, float]

    @property
    def tokens(self) -> int:
        """Tokens that all answers have."""
        return sum(len(a.ids) for a in self.answers)


class _Kept(LogitsProcessor):
    """Counts the tokens that the processors before it left possible."""

    def __init__(self) -> None:
        self.kept, self.laws = 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.kept += float((scores > -torch.inf).sum())
        self.laws += len(scores)
        return scores


def respond(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    copies: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
    on_tokens: OnTokens | None = None,
) -> Responses:
    """`copies` answers to each prompt (ids), prompt by prompt, with the seed alone deciding what is sampled.

    `progress(done, total, tokens)` is called after each batch; `on_tokens(new ids)` while a single answer grows.

    Raises:
        ValueError: when the loop refuses what it is given.
    """
    if (returned := getattr(decoding.loop, "returned", 1)) != 1:
        raise ValueError(
            f"{type(decoding.loop).__name__} would return {returned} sequences a prompt; leave out `returned`: several "
            "answers are asked for by `copies` here, -n on the command line"
        )
    rows = [(i, prompt) for i, prompt in enumerate(prompts) for _ in range(copies)]
    at_once = decoding.batch if getattr(decoding.loop, "batches", True) else 1
    loop, kept = decoding.loop, _Kept()
    streamer = _Streamer(on_tokens) if on_tokens is not None and len(rows) == 1 else None
    answers: list[Answer] = []
    seconds, counts = 0.0, dict[str, float]()
    with sampling_mode(policy), _lent(decoding, RandomDraw(torch.Generator().manual_seed(seed)), streamer):
        for begin in range(0, len(rows), at_once):
            some = rows[begin : begin + at_once]
            started = time.perf_counter()
            new = _decode(policy, [p for _, p in some], decoding, kept)
            seconds += time.perf_counter() - started
            for key, value in (loop.last_run.counts if loop.last_run is not None else {}).items():
                counts[key] = counts.get(key, 0.0) + value
            ended = [bool(ids) and (ids[-1] in policy.eos_ids or len(ids) < decoding.max_tokens) for ids in new]
            stand: list[Standing | None] = [None] * len(new)
            if decoding.held is not None:
                for i, ids in enumerate(new):
                    stand[i], new[i] = standing(decoding.held, ids, policy.eos_ids, limit=decoding.max_tokens)
            logprobs = _logprobs(policy, [p for _, p in some], new)
            for i, (prompt, _) in enumerate(some):
                answers.append(Answer(prompt, new[i], logprobs[i], not ended[i], stand[i]))
            if progress is not None:
                progress(len(answers), len(rows), sum(len(a.ids) for a in answers))
    if kept.laws:
        counts["kept"] = kept.kept / kept.laws
    return Responses(answers, seconds, counts)


@contextmanager
def _lent(decoding: Decoding, draw: RandomDraw, streamer: _Streamer | None) -> Iterator[None]:
    """The source of random choices and the streamer, for the loop and its processors, while the block lasts."""
    loop = decoding.loop
    drawing = [loop, *(shaper for shaper in decoding.shapers if hasattr(shaper, "draw"))]
    before, shown = [each.draw for each in drawing], loop.streamer
    try:
        for each in drawing:
            each.draw = draw
        loop.streamer = streamer
        yield
    finally:
        for each, own in zip(drawing, before, strict=True):
            each.draw = own
        loop.streamer = shown


def _decode(policy: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, kept: _Kept) -> list[list[int]]:
    ids, pads = left_padded([tuple(p) for p in prompts], policy.device)
    real = (torch.arange(ids.shape[1], device=policy.device) >= pads[:, None]).long()
    processors = list(decoding.shapers)
    if decoding.constraint is not None and getattr(decoding.loop, "constraint", None) is None:
        processors.insert(0, Masks(decoding.constraint, ids.shape[1], policy.eos_ids))
    result = policy.model.generate(
        ids,
        attention_mask=real,
        do_sample=decoding.sample,
        # The model's own defaults would add temperatures and cuts that nobody asked for.
        temperature=1.0,
        # Without sampling transformers warns of any but its default.
        top_k=0 if decoding.sample else 50,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=decoding.max_tokens,
        eos_token_id=sorted(policy.eos_ids) or None,
        pad_token_id=0 if policy.pad_id is None else policy.pad_id,
        logits_processor=LogitsProcessorList([*processors, kept] if processors else []),
        custom_generate=decoding.loop,
    )
    new = result[:, ids.shape[1] :].tolist()
    return [_ended(row, policy.eos_ids, policy.pad_id) for row in new]


def _ended(row: list[int], eos: Any, pad: int | None) -> list[int]:
    for i, token in enumerate(row):
        if token in eos:
            return row[: i + 1]
    while row and not eos and row[-1] == pad:
        row = row[:-1]
    return row


def _logprobs(policy: Any, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[float]:
    """Mean log-prob of each answer's tokens, the model alone; 0 for an empty answer."""
    found = []
    accepts_last = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    for prompt, ids in zip(prompts, new, strict=True):
        if not ids:
            found.append(0.0)
            continue
        whole = torch.tensor([[*prompt, *ids]], device=policy.device)
        options = {"logits_to_keep": len(ids) + 1} if accepts_last else {}
        logits = policy.model(input_ids=whole, **options).logits[0, -len(ids) - 1 : -1].float()
        taken = logits.log_softmax(-1).gather(1, whole[0, -len(ids) :, None])
        found.append(float(taken.mean()))
    return found


class _Streamer:
    """What a loop calls with new ids of its row."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens

    def put(self, ids: Tensor) -> None:
        self._on_tokens(ids.flatten().tolist())

    def end(self) -> None:
        """Nothing is left to show: ids are shown as they come."""


def text_pieces(tokenizer: Any) -> Callable[[list[int]], str]:
    """A function of new ids that gives the text they add, whole characters only."""
    ids: list[int] = []
    shown = 0

    def piece(new: list[int]) -> str:
        nonlocal shown
        ids.extend(new)
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        # A character of several tokens shows as U+FFFD until it is whole.
        end = len(text) - 1 if text.endswith("\ufffd") else len(text)
        fresh, shown = text[shown:end], max(shown, end)
        return fresh

    return piece


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams of `ids` that occurred before in it."""
    grams = list(_grams(ids, n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of several answers; 1 where nothing is said twice."""
    grams = [g for ids in answers for g in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _grams(ids: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
