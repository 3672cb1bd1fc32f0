"""Labels for a router: positions where the small model's token would change what the large one goes on to say.

The large model's greedy response is the reference. The small model reads it; where both would say the same, the
position is neutral. Where they differ, the large model goes on from either token to the end of the sentence, and a
judge says whether the difference matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.hidden_states import evaluating
from tokenloom.decode.session import open_session
from tokenloom.methods.decoding.r2r import TOP
from tokenloom.rollout.forward import base_model

_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


@dataclass(frozen=True)
class Question:
    """What a judge compares: two ways to end a sentence after the same text."""

    text: str
    large: str
    small: str


Judge = Callable[[Question], bool]


@dataclass(frozen=True)
class Labels:
    """One entry per position of the responses, N in all."""

    hidden: Tensor
    """[N, D] the small model's last hidden states, float32."""
    logits: Tensor
    """[N, K] its largest logits, in falling order, float32."""
    tokens: Tensor
    """[N] its most probable tokens."""
    labels: Tensor
    """[N] float: 1 where its token leads elsewhere."""
    differs: Tensor
    """[N] bool: where the models' tokens differ."""
    prompt: Tensor
    """[N] which prompt a position belongs to, for splits."""


def label(
    small: Any, large: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, judge: Judge, *,
    max_tokens: int = 512, sentence: int = 64, top: int = TOP,
) -> Labels:  # fmt: skip
    """Labels for the positions of the large model's greedy responses to `prompts` (ids without padding).

    A sentence ends with its punctuation, after `sentence` tokens, or with the response.

    Raises:
        ValueError: without prompts, or for models with heads of different widths.
    """
    if not prompts:
        raise ValueError("r2r: labels need prompts")
    eos = _end_tokens(large)
    responses = _greedy(large, prompts, max_tokens, lambda ids: ids[-1] in eos)
    kept: list[tuple[Tensor, ...]] = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        hidden, scores = _read(small, prompt, response)
        tokens = scores.argmax(-1)
        differs = tokens.cpu() != torch.tensor(response)
        at = differs.nonzero()[:, 0].tolist()
        branches = [[*prompt, *response[:i], int(tokens[i])] for i in at]
        labels = torch.zeros(len(response))
        for i, ending in zip(at, _endings(large, branches, tokenizer, eos, sentence), strict=True):
            own = _until_sentence_end(response[i:], tokenizer, eos, sentence)
            question = Question(
                tokenizer.decode([*prompt, *response[:i]], skip_special_tokens=True),
                tokenizer.decode(own, skip_special_tokens=True),
                tokenizer.decode([int(tokens[i]), *ending], skip_special_tokens=True),
            )
            labels[i] = float(judge(question))
        largest = scores.float().topk(top, -1).values
        row = torch.full((len(response),), number)
        kept.append((hidden.float().cpu(), largest.cpu(), tokens.cpu(), labels, differs, row))
    return Labels(*(torch.cat(column) for column in zip(*kept, strict=True)))


def judge_by_model(model: Any, tokenizer: Any) -> Judge:
    """A judge that asks a model, which answers by the more probable of "1" (differs) and "0"."""
    one, zero = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("1", "0"))

    def judge(question: Question) -> bool:
        text = (
            "Two continuations of a text are given. Answer 1 if they differ in meaning, reasoning or conclusion, and "
            f"0 if they say the same in other words.\n\nText: {question.text}\n\nContinuation A: {question.large}\n\n"
            f"Continuation B: {question.small}\n\nAnswer: "
        )
        ids = torch.tensor([tokenizer.encode(text)], device=next(base_model(model).parameters()).device)
        with torch.no_grad(), evaluating(base_model(model)):
            scores = model(input_ids=ids, use_cache=False).logits[0, -1]
        return bool(scores[one] > scores[zero])

    return judge


def _read(small: Any, prompt: Sequence[int], response: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The small model's last hidden states [T, D] and logits [T, V] before each token of a response."""
    device = next(base_model(small).parameters()).device
    ids = torch.tensor([[*prompt, *response[:-1]]], device=device)
    with torch.no_grad(), evaluating(base_model(small)):
        output = small(input_ids=ids, use_cache=False, output_hidden_states=True)
    first = len(prompt) - 1
    return output.hidden_states[-1][0, first:], output.logits[0, first:]


def _endings(
    large: Any, branches: Sequence[Sequence[int]], tokenizer: Any, eos: frozenset[int], most: int
) -> list[list[int]]:
    """How the large model ends the sentence behind the last token of each branch."""
    done = [_sentence_ends(b, tokenizer, eos) for b in branches]
    unfinished = [b for b, ended in zip(branches, done, strict=True) if not ended]
    found = iter(_greedy(large, unfinished, most, lambda ids: _sentence_ends(ids, tokenizer, eos)))
    return [[] if ended else next(found) for ended in done]


def _until_sentence_end(ids: Sequence[int], tokenizer: Any, eos: frozenset[int], most: int) -> list[int]:
    for n in range(1, min(len(ids), most + 1)):
        if _sentence_ends(ids[:n], tokenizer, eos):
            return list(ids[:n])
    return list(ids[: most + 1])


def _sentence_ends(ids: Sequence[int], tokenizer: Any, eos: frozenset[int]) -> bool:
    if ids[-1] in eos:
        return True
    text: str = tokenizer.decode([ids[-1]])
    return text.endswith("\n") or text.rstrip().endswith(_ENDS)


def _greedy(
    model: Any, prompts: Sequence[Sequence[int]], most: int, ended: Callable[[list[int]], bool]
) -> list[list[int]]:
    """Greedy continuations, together, each until `ended` says so of what was added, its last token included."""
    new: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    if not live:
        return new
    with open_session(model, prompts) as session:
        scores = session.start()
        while True:
            for row, token in zip(live, scores.argmax(-1).tolist(), strict=True):
                new[row].append(token)
            running = [i for i, row in enumerate(live) if len(new[row]) < most and not ended(new[row])]
            if not running:
                return new
            if len(running) < len(live):
                session.branch(running)
            live = [live[i] for i in running]
            scores = session.step(torch.tensor([new[r][-1] for r in live]))


def _end_tokens(model: Any) -> frozenset[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
