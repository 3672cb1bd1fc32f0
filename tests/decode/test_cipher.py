"""CIPHER on models: greedy in the limit, the recurrence by hand, debates that equal debates in tokens in the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.cipher import Agent, Wording, debate
from tokenloom.decode.embedded import embedding_table

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}


class Letters:
    """a is 3, b is 4 and so on; the end token is 1."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3 + (ord(c) - 97) % 60 for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(94 + i) for i in ids if i > 2)


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_temperature_is_greedy_decoding(name: str) -> None:
    model = TINY[name]()
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    loop = decode.loop("cipher", temperature=0.0)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY), theirs)
    assert torch.equal(loop.said[0], embedding_table(model)[theirs[0, 5 : 5 + len(loop.said[0])]])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_the_recurrence_by_hand(name: str) -> None:
    model = TINY[name](seed=2)
    loop = decode.loop("cipher", temperature=0.7)
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY)
    table = embedding_table(model)
    directions = torch.nn.functional.normalize(table, dim=-1)
    for row in range(3):
        with torch.no_grad():
            inputs = model.get_input_embeddings()(IDS[row][MASK[row].bool()])[None]
            for step, said in enumerate(loop.said[row]):
                scores = model(inputs_embeds=inputs).logits[0, -1]
                expected = (scores / 0.7).softmax(-1) @ table
                torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
                assert ours[row, 5 + step] == (directions @ expected).argmax()
                inputs = torch.cat((inputs, said.view(1, 1, -1)), 1)
    assert not torch.equal(ours, model.generate(IDS, attention_mask=MASK, **GREEDY))


def greedy(model: Any, prompt: list[int], limit: int) -> list[int]:
    given = {"attention_mask": torch.ones(1, len(prompt)), "do_sample": False, "max_new_tokens": limit}
    ids = model.generate(torch.tensor([prompt]), **given)[0, len(prompt) :].tolist()
    return ids[: ids.index(1)] if 1 in ids else ids


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_temperature_a_debate_is_one_in_tokens(name: str) -> None:
    first, second = TINY[name](seed=1), TINY[name](seed=2)
    tokenizer, words = Letters(), Wording("others", "own", "answer")
    result = debate([Agent(first, 0.0), Agent(second, 0.0)], "question", tokenizer, max_tokens=5, wording=words)
    said = [greedy(m, tokenizer.encode("question"), 5) for m in (first, second)]
    expected = [said]
    for _ in range(2):
        said = [
            greedy(
                model,
                next(map(tokenizer.encode, ("question",)))
                + tokenizer.encode("others") + said[1 - i] + tokenizer.encode("own") + said[i]
                + tokenizer.encode("answer"),
                5,
            )
            for i, model in enumerate((first, second))
        ]  # fmt: skip
        expected.append(said)
    assert result.answers == expected
    assert result.answer == tokenizer.decode(expected[-1][0], True)


def test_the_calmest_agent_answers_and_temperatures_matter() -> None:
    model = tiny_llama(seed=1)
    result = debate([Agent(model, 0.9), Agent(model, 0.1)], "hello", Letters(), rounds=2, max_tokens=6)
    assert result.speaker == 1
    assert result.answer == Letters().decode(result.answers[1][1], True)
    calm = debate([Agent(model, 0.0), Agent(model, 0.0)], "hello", Letters(), rounds=2, max_tokens=6)
    assert calm.answers[0][0] == calm.answers[0][1]
    assert result.answers != calm.answers


def test_refusals() -> None:
    with pytest.raises(ValueError, match="same tokenizer"):
        debate([Agent(tiny_llama(), 0.1), Agent(tiny_llama(vocab=70), 0.1)], "a", Letters())
    with pytest.raises(ValueError, match="at least one agent"):
        debate([], "a", Letters())
    with pytest.raises(ValueError, match="temperature"):
        decode.loop("cipher", temperature=-1.0)
