"""ICN on a model: rounds of new first tokens away from the answers found, each completed by the plain prompt.

found = explore(model, tokenizer, prompt_of, rounds=10, n_tol=10, stop='"')
answers = [f.text for f in found]

`prompt_of(answers)` gives the text of a prompt that lists answers already found, `prompt_of([])` the plain one; it ends
where the next answer begins, such as `1. "paper"\\n2. "`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenloom.decode.candidates import encoded, until_stop
from tokenloom.decode.plain import Plain
from tokenloom.decode.run import run_of
from tokenloom.decode.session import open_session
from tokenloom.methods.decoding.icn import unexplored

PromptOf = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Found:
    """An answer, the token it began with, and the round of its discovery from 0."""

    text: str
    first_token: int
    round: int


def explore(
    model: Any,
    tokenizer: Any,
    prompt_of: PromptOf,
    *,
    rounds: int = 10,
    n_tol: int = 10,
    pool: int = 100,
    max_new_tokens: int = 64,
    stop: str = "\n",
    explored: Sequence[str] = (),
) -> list[Found]:
    """Answers in the order of discovery; `explored` are known before and only steer.

    Each answer is decoded greedily up to `stop` (left out), the end token or the limit. Tokens of one text count as
    one, and what known answers begin with as used. Every call gives the same.

    Raises:
        ValueError: for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"icn needs rounds >= 1, got {rounds}")
    listed: list[str] = list(explored)
    seen: set[Hashable] = {_first_text(tokenizer, answer) for answer in explored}
    plain = encoded(tokenizer, prompt_of([]))
    found: list[Found] = []

    def name(token: int) -> Hashable:
        return str(tokenizer.decode([token]))

    for number in range(rounds):
        with open_session(model, [encoded(tokenizer, prompt_of(listed))]) as session:
            tokens = unexplored(session.start()[0], seen, name, n_tol=n_tol, pool=pool)
        if not tokens:
            break
        seen |= {name(t) for t in tokens}
        texts = _completed(model, tokenizer, plain, tokens, max_new_tokens, stop)
        found += [Found(text, token, number) for text, token in zip(texts, tokens, strict=True)]
        listed += texts
    return found


def _completed(
    model: Any, tokenizer: Any, plain: Sequence[int], tokens: Sequence[int], limit: int, stop: str
) -> list[str]:
    """The answers that begin with `tokens`, decoded greedily all at once."""
    given = torch.tensor([[*plain, token] for token in tokens], device=next(model.parameters()).device)

    def stopped(ids: Tensor, scores: Any) -> Tensor:
        new = [tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, len(plain) :].tolist()]
        return torch.tensor([stop in text for text in new], device=ids.device)

    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers' has no annotations
        max_length=given.shape[1] + limit, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    run = run_of(model, given, [], [stopped] if stop else [], config, None)
    first = stopped(given, None).tolist() if stop else [False] * len(tokens)
    generated: list[list[int]] = Plain().rows(run)
    texts = []
    for token, new, over in zip(tokens, generated, first, strict=True):
        ids = [token] if over or token in run.eos else [token, *until_stop(new, run.eos)]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        texts.append((text.split(stop)[0] if stop else text).strip())
    return texts


def _first_text(tokenizer: Any, answer: str) -> str:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return str(tokenizer.decode(ids[:1]))
