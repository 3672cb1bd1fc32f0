"""PriDe on a model: letters' probabilities of multiple-choice questions, a share of them asked in every cyclic order.

answers = pride(model, prompt_of, len(questions), options=4, letters=letter_tokens(tokenizer, "ABCD"))

`prompt_of(question, order)` gives the ids of question number `question` with its contents shown in `order`; they end
where the letter comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.session import open_session
from tokenloom.methods.decoding.mcq_text_answers import letter_logprobs
from tokenloom.methods.decoding.pride import cyclic_orders, debias, global_prior, permuted_mean, prior_of

PromptOf = Callable[[int, Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class Debiased:
    """What PriDe found, for Q questions of n options in their own order."""

    answers: Tensor
    """[Q], the content chosen."""
    plain: Tensor
    """[Q], the content of the likeliest letter, nothing taken out."""
    prior: Tensor
    """[n]."""
    queries: int


def letter_tokens(tokenizer: Any, letters: Sequence[str]) -> list[list[int]]:
    """The token ids that mean each letter: the letter alone and behind a blank, where those are single tokens.

    Raises:
        ValueError: for a letter without such a token.
    """
    found = []
    for letter in letters:
        spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
        # Tokenizers that put a mark of the word's start before any text spell both alike.
        ids = sorted({ids[-1] for ids in spelled if len(ids) == 1})
        if not ids:
            raise ValueError(f"the tokenizer has no single token for the option letter {letter!r}; use other letters")
        found.append(ids)
    return found


def option_probs(
    model: Any, prompts: Sequence[Sequence[int]], letters: Sequence[Sequence[int]], *, batch: int = 16
) -> Tensor:
    """The probabilities [N, n] of the letters after each prompt, over the whole vocabulary, float64."""
    found = []
    for begin in range(0, len(prompts), batch):
        with open_session(model, prompts[begin : begin + batch]) as session:
            found.append(letter_logprobs(session.start(), letters).double().exp().cpu())
    return torch.cat(found)


def pride(
    model: Any,
    prompt_of: PromptOf,
    questions: int,
    *,
    letters: Sequence[Sequence[int]],
    share: float = 0.05,
    prior: Tensor | None = None,
    seed: int = 0,
    batch: int = 16,
) -> Debiased:
    """Answers to `questions` questions; the prior comes from a random `share` of them, one question at least.

    With a `prior` [n] from elsewhere no question is permuted.

    Raises:
        ValueError: without questions, for a share outside (0, 1], fewer than two letters, or a prior of another size.
    """
    n = len(letters)
    if n < 2 or (prior is not None and prior.shape != (n,)):
        given = "no prior" if prior is None else f"a prior {list(prior.shape)}"
        raise ValueError(f"pride chooses among two letters or more with a prior of as many; got {n} and {given}")
    if questions < 1 or not 0 < share <= 1:
        raise ValueError(f"pride needs questions and a share in (0, 1], got {questions} and {share}")
    orders = cyclic_orders(n)
    asked = 0 if prior is not None else max(1, math.floor(share * questions))
    some = torch.randperm(questions, generator=torch.Generator().manual_seed(seed))[:asked].tolist()
    plain_probs = option_probs(model, [prompt_of(q, orders[0]) for q in range(questions)], letters, batch=batch)
    answers = torch.zeros(questions, dtype=torch.int64)
    rows: dict[int, Tensor] = {}
    if some:
        rotated = [prompt_of(q, order) for q in some for order in orders[1:]]
        others = option_probs(model, rotated, letters, batch=batch).view(asked, n - 1, n)
        rows = {q: torch.cat((plain_probs[q][None], found)) for q, found in zip(some, others, strict=True)}
        prior = global_prior([prior_of(r) for r in rows.values()])
    assert prior is not None
    answers = debias(plain_probs, prior).argmax(-1)
    for q, cyclic in rows.items():
        answers[q] = permuted_mean(cyclic).argmax()
    return Debiased(answers, plain_probs.argmax(-1), prior, questions + asked * (n - 1))
