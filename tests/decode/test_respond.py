"""Answers with their measures, from prompts of any length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

from tests.tiny_models import tiny_llama
from tokenloom.decode.plain import Plain
from tokenloom.decode.respond import Decoding, distinct, repeated, respond, text_pieces
from tokenloom.draw import RandomDraw
from tokenloom.policy import Policy

PROMPTS = [[5, 9, 4, 7, 11], [3, 8], [12, 3, 3, 3, 3, 6, 6]]


@pytest.fixture
def policy() -> Policy:
    return Policy(tiny_llama())


def test_batches_change_nothing_and_seeds_repeat(policy: Policy) -> None:
    found = [
        respond(policy, PROMPTS, Decoding(sample=False, max_tokens=6, batch=batch), seed=1).answers
        for batch in (1, 2, 16)
    ]
    assert [a.ids for a in found[0]] == [a.ids for a in found[1]] == [a.ids for a in found[2]]
    sampled = [respond(policy, PROMPTS, Decoding(max_tokens=6), copies=2, seed=s) for s in (3, 3, 4)]
    assert [a.ids for a in sampled[0].answers] == [a.ids for a in sampled[1].answers]
    assert [a.ids for a in sampled[0].answers] != [a.ids for a in sampled[2].answers]
    assert [a.prompt for a in sampled[0].answers] == [0, 0, 1, 1, 2, 2]


def test_logprobs_are_the_models_own(policy: Policy) -> None:
    found = respond(policy, PROMPTS, Decoding([TopKLogitsWarper(3)], max_tokens=5), seed=2)
    for prompt, answer in zip(PROMPTS, found.answers, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + answer.ids])).logits[0].log_softmax(-1)
        taken = [float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(answer.ids)]
        assert answer.logprob == pytest.approx(sum(taken) / len(taken), abs=1e-4)
        assert answer.truncated == (answer.ids[-1] != 1)
    assert found.counts["kept"] == 3
    assert found.tokens == sum(len(a.ids) for a in found.answers)


def test_a_single_answer_is_told_as_it_grows(policy: Policy) -> None:
    told: list[int] = []
    found = respond(policy, PROMPTS[:1], Decoding(max_tokens=6), seed=5, on_tokens=told.extend)
    assert told == found.answers[0].ids


def test_a_loop_keeps_its_own_draw_and_streamer(policy: Policy) -> None:
    own = RandomDraw(torch.Generator().manual_seed(1))
    loop = Plain()
    loop.draw = own
    respond(policy, PROMPTS[:1], Decoding(loop=loop, max_tokens=3), seed=5, on_tokens=lambda ids: None)
    assert loop.draw is own
    assert loop.streamer is None

    def broken(ids: list[int]) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        respond(policy, PROMPTS[:1], Decoding(loop=loop, max_tokens=3), on_tokens=broken)
    assert loop.draw is own
    # Several rows, which a streamer left behind would refuse.
    assert len(respond(policy, PROMPTS, Decoding(loop=loop, max_tokens=3)).answers) == 3
    assert loop.streamer is None


def test_loops_of_one_row_get_one_row(policy: Policy) -> None:
    class Single(Plain):
        batches = False

    found = respond(policy, PROMPTS, Decoding(loop=Single(), sample=False, max_tokens=4))
    assert [a.ids for a in found.answers] == [
        a.ids for a in respond(policy, PROMPTS, Decoding(sample=False, max_tokens=4)).answers
    ]
    with pytest.raises(ValueError, match="one row at a time"):
        policy.model.generate(torch.tensor([[3, 4], [4, 5]]), custom_generate=Single(), max_new_tokens=2)


def test_measures_of_repetition() -> None:
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4], n=4) == pytest.approx(1 / 5)
    assert repeated([1, 2]) == 0
    assert distinct([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)
    assert distinct([[1]]) == 1


def test_text_comes_in_whole_characters() -> None:
    raw = "a€b".encode()
    tokenizer: Any = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    piece = text_pieces(tokenizer)
    assert [piece([b]) for b in raw] == ["a", "", "", "€", "b"]
