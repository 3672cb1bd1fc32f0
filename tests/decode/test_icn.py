"""ICN on a model: one round is plain branching, rounds differ in their first tokens, every call is the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom.decode.icn import explore

TOKENIZER = byte_level()
MODEL = tiny_llama(vocab=len(TOKENIZER), seed=2)


def prompt_of(answers: Sequence[str]) -> str:
    return "names:" + "".join(f"{i + 1}. {a}" for i, a in enumerate(answers)) + f"{len(answers) + 1}. "


def greedy(prompt: str, token: int, limit: int) -> list[int]:
    ids = torch.tensor([[*TOKENIZER(prompt)["input_ids"], token]])
    new = MODEL.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    return [token, *new[0, ids.shape[1] :].tolist()]


def test_one_round_is_branching_at_the_first_token() -> None:
    found = explore(MODEL, TOKENIZER, prompt_of, rounds=1, n_tol=4, max_new_tokens=5, stop="")
    with torch.no_grad():
        scores = MODEL(torch.tensor([TOKENIZER(prompt_of([]))["input_ids"]])).logits[0, -1]
    tokens, names = list[int](), set[str]()
    for token in scores.sort(descending=True, stable=True).indices.tolist():
        if TOKENIZER.decode([token]) not in names and len(tokens) < 4:
            names.add(TOKENIZER.decode([token]))
            tokens.append(token)
    assert [f.first_token for f in found] == tokens
    for f in found:
        assert f.first_token != MODEL.config.eos_token_id
        ids = greedy(prompt_of([]), f.first_token, 5)
        assert f.text == TOKENIZER.decode(ids, skip_special_tokens=True).strip()
        assert f.round == 0


def test_first_tokens_differ_and_calls_repeat() -> None:
    calls = [
        explore(MODEL, TOKENIZER, prompt_of, rounds=3, n_tol=2, max_new_tokens=4, stop="e", explored=["the"])
        for _ in range(2)
    ]
    assert calls[0] == calls[1]
    firsts = [TOKENIZER.decode([f.first_token]) for f in calls[0]]
    assert len(set(firsts)) == len(firsts) == 6
    assert TOKENIZER.decode(TOKENIZER.encode("the", add_special_tokens=False)[:1]) not in firsts
    assert [f.round for f in calls[0]] == [0, 0, 1, 1, 2, 2]
    assert all("e" not in f.text for f in calls[0])


def test_later_rounds_read_the_list_and_complete_without_it() -> None:
    seen: list[list[str]] = []

    def spied(answers: Sequence[str]) -> str:
        seen.append(list(answers))
        return prompt_of(answers)

    found = explore(MODEL, TOKENIZER, spied, rounds=2, n_tol=2, max_new_tokens=4, stop="")
    assert seen == [[], [], [f.text for f in found[:2]]]
    last = found[-1]
    ids = greedy(prompt_of([]), last.first_token, 4)
    assert last.text == TOKENIZER.decode(ids, skip_special_tokens=True).strip()


def test_a_used_up_pool_ends_the_search() -> None:
    found = explore(MODEL, TOKENIZER, lambda answers: prompt_of([]), rounds=9, n_tol=2, pool=3, max_new_tokens=2)
    assert [f.round for f in found] == [0, 0, 1]
    with pytest.raises(ValueError, match="rounds >= 1"):
        explore(MODEL, TOKENIZER, prompt_of, rounds=0)
