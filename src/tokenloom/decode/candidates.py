"""Candidates: several finished responses to one prompt, and the vote among them.

candidates = sample(model, tokenizer, prompt, 16, answer=last_number, max_new_tokens=256, temperature=0.8)
best = candidates[majority([c.answer for c in candidates])]

model.generate(**inputs, do_sample=True, custom_generate=decode.loop("self-consistency", tokenizer=tokenizer, n=16))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenloom.decode.hidden_states import evaluating
from tokenloom.decode.plain import Plain
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.segment_search import Hypothesis, SearchLoop, draws, segment_search
from tokenloom.draw import Draw
from tokenloom.methods.decoding.self_consistency import majority
from tokenloom.rollout.forward import base_model
from tokenloom.tasks.verifiers.number import last_number

Extract = Callable[[str], Hashable]
"""The answer in a response's text, None where there is none."""


@dataclass(frozen=True)
class Candidate:
    """One response to a prompt."""

    prompt: list[int]
    ids: list[int]
    text: str
    """Special tokens left out."""
    answer: Hashable = None


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    n: int,
    *,
    answer: Extract | None = None,
    loop: Loop | None = None,
    draw: Draw | None = None,
    processors: Sequence[Any] = (),
    **settings: Any,
) -> list[Candidate]:
    """`n` responses to `prompt` (text or ids), by `loop` (default: token by token) under `generate`'s own `settings`.

    `settings` are those of a `GenerationConfig`, such as `max_new_tokens`, `temperature` or `do_sample=False`; the
    model's own defaults for them are left aside.

    Raises:
        ValueError: for n < 1.
    """
    if n < 1:
        raise ValueError(f"at least one candidate is needed, got n = {n}")
    ids = encoded(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    method = loop if loop is not None else Plain()
    given = torch.tensor([ids] * n, device=next(base_model(model).parameters()).device)
    own = method.draw
    method.draw = own if draw is None else draw
    try:
        result = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=GenerationConfig(**_with_ends(model, settings)),  # type: ignore[no-untyped-call]  # transformers' has no annotations
            logits_processor=list(processors),
            custom_generate=method,
        )
    finally:
        method.draw = own
    stops = _stops(model, settings)
    found = [until_stop(row, stops) for row in result[:, len(ids) :].tolist()]
    texts = [tokenizer.decode(new, skip_special_tokens=True) for new in found]
    return [
        Candidate(ids, new, text, None if answer is None else answer(text))
        for new, text in zip(found, texts, strict=True)
    ]


def token_logprobs(model: Any, candidates: Sequence[Candidate]) -> list[Tensor]:
    """Log-probs [T] of each candidate's tokens under the model alone, float32, nats."""
    found = []
    with torch.no_grad(), evaluating(base_model(model)):
        for c in candidates:
            whole = torch.tensor([[*c.prompt, *c.ids]], device=next(base_model(model).parameters()).device)
            logits = model(input_ids=whole).logits[0, len(c.prompt) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, whole[0, len(c.prompt) :, None])[:, 0].cpu())
    return found


@decoder("self-consistency", kind="loop")
class SelfConsistency(SearchLoop):
    """Sample `n` responses and return the first whose answer is the most frequent.

    The answer is the last match of the regular expression `pattern` (its first group, if it has one), and by default
    the last number of the text.
    """

    def __init__(self, tokenizer: Any, *, n: int = 8, pattern: str = "") -> None:
        """Raises ValueError for n < 1 or a broken pattern."""
        if n < 1:
            raise ValueError(f"self-consistency: n = {n}; at least one response is needed")
        self.n, self.tokenizer, self.extract = n, tokenizer, answer_pattern(pattern) if pattern else last_number

    def copies(self, run: Run) -> list[int]:
        """How many responses each row gets."""
        return [self.n] * len(run)

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""
        copies = self.copies(run)
        run.counts["samples"] = float(sum(copies))

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            texts = [self.tokenizer.decode(list(h.tokens), skip_special_tokens=True) for h in candidates]
            return [candidates[majority([self.extract(text) for text in texts])]]

        return segment_search(
            run,
            propose=lambda live: draws(run, live, [copies[h.row] for h in live]),
            boundary=lambda h: False,
            score=lambda candidates: [0.0] * len(candidates),
            select=select,
            width=1,
        )


def answer_pattern(pattern: str) -> Extract:
    """The last match of a regular expression in a text, its first group if there is one, without blanks around.

    Raises:
        ValueError: for a pattern that cannot be read.
    """
    try:
        made = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the answer's pattern {pattern!r} cannot be read: {error}") from None

    def found(text: str) -> str | None:
        matches = list(made.finditer(text))
        answer = matches[-1].group(1 if made.groups else 0) if matches else None
        return None if answer is None else answer.strip()

    return found


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, with the start token if the tokenizer adds one."""
    return [int(t) for t in tokenizer(text)["input_ids"]]


def until_stop(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    """`ids` up to the first of `stops`, which stays."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def _stops(model: Any, settings: dict[str, Any]) -> frozenset[int]:
    given = _with_ends(model, settings).get("eos_token_id")
    return frozenset() if given is None else frozenset(given if isinstance(given, list) else [given])


def _with_ends(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    own = getattr(model, "generation_config", None)
    ends = {"eos_token_id": getattr(own, "eos_token_id", None), "pad_token_id": getattr(own, "pad_token_id", None)}
    if ends["pad_token_id"] is None:
        ends["pad_token_id"] = 0
    # Said one by one: what is left open is filled by the model's own configuration.
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    return {"do_sample": True, "max_new_tokens": 256} | neutral | ends | settings
