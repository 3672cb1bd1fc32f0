"""PriDe on a table model whose letters are a prior times contents: the prior is found, and the contents answered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom.decode.pride import letter_tokens, option_probs, pride
from tokenloom.decode.table import TableLM
from tokenloom.methods.decoding.pride import recall_std

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LETTERS = [[0], [1], [2], [3]]
QUESTIONS = 12
TRUTH = torch.arange(QUESTIONS) % 4


def prompt_of(question: int, order: Sequence[int]) -> list[int]:
    return [question, *order]


def law(prompt: tuple[int, ...]) -> list[float]:
    question, *order = prompt
    contents = torch.full((4,), 0.2, dtype=torch.float64)
    contents[TRUTH[question]] = 0.4
    letters = PRIOR * contents[order]
    return [*(0.9 * letters / letters.sum()).tolist(), 0.1]  # a token that is no letter has some mass


def test_the_prior_is_found_and_taken_out() -> None:
    model = TableLM(5, law)
    found = pride(model, prompt_of, QUESTIONS, letters=LETTERS, share=0.25, batch=5)
    torch.testing.assert_close(found.prior, PRIOR, rtol=0, atol=1e-8)
    assert found.answers.tolist() == TRUTH.tolist()
    assert found.queries == QUESTIONS + 3 * 3
    assert recall_std(found.answers, TRUTH, 4) == 0
    assert recall_std(found.plain, TRUTH, 4) > 25


def test_shares_and_priors_from_elsewhere() -> None:
    model = TableLM(5, law)
    assert pride(model, prompt_of, QUESTIONS, letters=LETTERS, share=0.01).queries == QUESTIONS + 3
    everything = pride(model, prompt_of, QUESTIONS, letters=LETTERS, share=1.0)
    assert everything.queries == 4 * QUESTIONS
    assert everything.answers.tolist() == TRUTH.tolist()
    even = pride(model, prompt_of, QUESTIONS, letters=LETTERS, prior=torch.full((4,), 0.25))
    assert even.queries == QUESTIONS
    assert torch.equal(even.answers, even.plain)
    assert pride(model, prompt_of, QUESTIONS, letters=LETTERS, prior=PRIOR).answers.tolist() == TRUTH.tolist()


def test_letters_of_a_tokenizer() -> None:
    tokenizer = byte_level()
    letters = letter_tokens(tokenizer, "AB")
    assert [tokenizer.decode([ids[0]]) for ids in letters] == ["A", "B"]
    model = tiny_llama(vocab=len(tokenizer))
    prompts = [[5, 9, 4], [8, 3]]
    probs = option_probs(model, prompts, letters, batch=1)
    with torch.no_grad():
        laws = torch.stack([model(torch.tensor([p])).logits[0, -1].softmax(-1) for p in prompts])
    expected = torch.stack([laws[:, ids].sum(-1) for ids in letters], -1).double()
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="no single token"):
        letter_tokens(tokenizer, ["AB"])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        pride(TableLM(5, law), prompt_of, 3, letters=LETTERS, share=0.0)
    with pytest.raises(ValueError, match=r"two letters or more.*no prior"):
        pride(TableLM(5, law), prompt_of, 3, letters=LETTERS[:1])
    with pytest.raises(ValueError, match=r"a prior \[7\]"):
        pride(TableLM(5, law), prompt_of, 3, letters=LETTERS, prior=torch.ones(7) / 7)
