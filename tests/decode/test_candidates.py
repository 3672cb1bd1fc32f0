"""Candidates: samples are generate's own; the vote inside generate has the law of a vote among independent samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama, tiny_phi
from tokenloom import decode
from tokenloom.decode.candidates import (
    SelfConsistency,
    answer_pattern,
    encoded,
    sample,
    token_logprobs,
    until_stop,
)
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.draw import Draw, RandomDraw, law_of
from tokenloom.methods.decoding.self_consistency import majority


class Digits:
    """A tokenizer whose token 0 is no number."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join("?" if t == 0 else str(t) for t in ids)


def run_on(model: TableLM, draw: Draw, *, sample: bool = True, limit: int = 2) -> Run:
    ids = torch.tensor([[1]])
    return Run(model, ids, [[1]], limit, frozenset(), 0, sample, draw=draw)


@pytest.mark.parametrize(("vocab", "length"), [(3, 1), (2, 2)])
def test_the_law_is_that_of_a_vote_among_independent_samples(vocab: int, length: int) -> None:
    model, tokenizer = TableLM.random(vocab, seed=1), Digits()
    method = SelfConsistency(tokenizer, n=3)
    found = law_of(lambda draw: tuple(method.rows(run_on(model, draw, limit=length))[0]))
    single, expected = model.string_law([1], length), dict[tuple[int, ...], float]()
    for texts in itertools.product(single, repeat=3):
        winner = texts[majority([method.extract(tokenizer.decode(t)) for t in texts])]
        expected[winner] = expected.get(winner, 0.0) + single[texts[0]] * single[texts[1]] * single[texts[2]]
    assert found == pytest.approx(expected, abs=1e-9)


def test_one_sample_is_plain_and_greedy_is_greedy() -> None:
    model = TableLM.random(3, seed=2)
    one = law_of(lambda draw: tuple(SelfConsistency(Digits(), n=1).rows(run_on(model, draw))[0]))
    assert one == pytest.approx(model.string_law([1], 2), abs=1e-9)
    greedy = SelfConsistency(Digits(), n=5).rows(run_on(model, RandomDraw(), sample=False))
    assert greedy == decode.loop("plain").rows(run_on(model, RandomDraw(), sample=False))


def test_in_generate_with_padding() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=len(tokenizer))
    given = tokenizer(["the answer is", "12"], return_tensors="pt", padding=True, padding_side="left")
    loop = decode.loop("self-consistency", tokenizer=tokenizer, n=4)
    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    ids = model.generate(
        given.input_ids, attention_mask=given.attention_mask, do_sample=True, max_new_tokens=6, custom_generate=loop
    )
    assert ids.shape[0] == 2
    assert loop.last_run.counts["samples"] == 8


def test_samples_are_generates() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=len(tokenizer), seed=1)
    prompt = "the answer"
    ids = torch.tensor([encoded(tokenizer, prompt)])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    [one, two] = sample(model, tokenizer, prompt, 2, do_sample=False, max_new_tokens=8, answer=len)
    assert one == two
    assert one.ids == until_stop(theirs[0, ids.shape[1] :].tolist(), frozenset({1}))
    assert one.text == tokenizer.decode(one.ids, skip_special_tokens=True)
    assert one.answer == len(one.text)
    [logprobs, _] = token_logprobs(model, [one, two])
    with torch.no_grad():
        law = model(torch.tensor([[*one.prompt, *one.ids]])).logits.log_softmax(-1)[0]
    expected = [float(law[len(one.prompt) - 1 + i, t]) for i, t in enumerate(one.ids)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    dropping = tiny_phi(vocab=len(tokenizer))
    expected = token_logprobs(dropping, [one])
    assert torch.equal(token_logprobs(dropping.train(), [one])[0], expected[0])
    draws = [RandomDraw(torch.Generator().manual_seed(4)) for _ in range(2)]
    assert sample(model, tokenizer, prompt, 3, draw=draws[0], max_new_tokens=5) == sample(
        model, tokenizer, prompt, 3, draw=draws[1], max_new_tokens=5
    )
    loop = decode.loop("plain")
    sample(model, tokenizer, prompt, 1, draw=draws[0], loop=loop, max_new_tokens=2)
    assert loop.draw is None  # later calls draw as before


def test_answers_by_pattern() -> None:
    assert answer_pattern(r"\d+")("1 and 22") == "22"
    assert answer_pattern(r"answer: *(\w+)")("answer: a. answer:  b ") == "b"
    assert answer_pattern(r"\d+")("none") is None
    assert answer_pattern(r"(x)|y")("x y") is None


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        decode.loop("self-consistency", tokenizer=Digits(), pattern="(")
    with pytest.raises(ValueError, match="n = 0"):
        SelfConsistency(Digits(), n=0)
    with pytest.raises(ValueError, match="n = 0"):
        sample(None, None, "a", 0)
    with pytest.raises(ValueError, match="tokenizer"):
        decode.loop("self-consistency")
