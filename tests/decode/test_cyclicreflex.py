"""CyclicReflex under `generate`: where prompts end, which rows think, which tokens are words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_models import tiny_llama
from tokenloom.decode import shaper
from tokenloom.decode.cyclicreflex import CyclicReflex

WAIT, SPACED, END = 20, 21, (30, 31)


class Tokenizer:
    """Some words of one token, an end of thinking of two."""

    known = {"wait": [WAIT], " wait": [SPACED], "but": [22, 23], " but": [24, 23], "</think>": list(END), " ": [45]}  # noqa: RUF012  # never changed

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return self.known.get(text, [40, 41])


def build(amplitude: float = 4.0, **parameters: object) -> CyclicReflex:
    made = shaper(
        "cyclicreflex", tokenizer=Tokenizer(), words="wait,but", period=8.0, amplitude=amplitude, **parameters
    )
    assert isinstance(made, CyclicReflex)
    return made


def delta(found: Tensor) -> list[float]:
    """What the score of `wait` has risen by in each row; nothing else may have moved."""
    assert torch.equal(found[:, WAIT], found[:, SPACED])
    others = found.clone()
    others[:, [WAIT, SPACED]] = 0
    assert not bool(others.any())
    return found[:, WAIT].tolist()


def test_waves_count_generated_tokens_only() -> None:
    processor, ids = build(), torch.tensor([[2, 2, 5, 9], [8, 3, 11, 6]])
    found = []
    for _ in range(9):
        found.append(delta(processor(ids, torch.zeros(2, 50))))
        ids = torch.cat((ids, torch.full((2, 1), 7)), 1)
    assert found == [[d, d] for d in (0.0, 2.0, 4.0, 2.0, 0.0, -2.0, -4.0, -2.0, 0.0)]


def test_rows_that_ended_thinking_are_left_alone() -> None:
    processor = build()
    prompts = torch.tensor([[*END, 5], [6, *END], [7, 8, 9]])
    assert delta(processor(prompts, torch.zeros(3, 50))) == [0.0, 0.0, 0.0]
    ids = torch.cat((prompts, torch.tensor([[*END], [31, 30], [30, 7]])), 1)
    assert delta(processor(ids, torch.zeros(3, 50))) == [0.0, 4.0, 4.0]
    # Reordered, as beams are.
    assert delta(processor(ids[[1, 0]], torch.zeros(2, 50))) == [4.0, 0.0]
    assert delta(build(end_of_thinking="")(prompts, torch.zeros(3, 50))) == [0.0, 0.0, 0.0]


def test_other_prompts_begin_anew_and_rows_may_come_one_by_one() -> None:
    processor = build()
    first, second = [5, 9], [6, 9]
    assert delta(processor(torch.tensor([first]), torch.zeros(1, 50))) == [0.0]
    assert delta(processor(torch.tensor([[*first, 7, 7]]), torch.zeros(1, 50))) == [4.0]
    assert delta(processor(torch.tensor([second]), torch.zeros(1, 50))) == [0.0]
    assert delta(processor(torch.tensor([[*second, 7], [*first, 7]]), torch.zeros(2, 50))) == [2.0, 2.0]
    assert delta(processor(torch.tensor([[9, 9, 9, 9, 9]]), torch.zeros(1, 50))) == [0.0]
    assert delta(processor(torch.tensor([[9, 9, 9, 9, 9, 1]]), torch.zeros(1, 50))) == [2.0]


def test_under_generate() -> None:
    model, ids = tiny_llama(), torch.tensor([[2, 5, 9], [8, 3, 11]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": False, "max_new_tokens": 6}
    plain = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, logits_processor=[build(amplitude=0.0)], **given), plain)
    processor = shaper(
        "cyclicreflex", tokenizer=Tokenizer(), words="wait", amplitude=1e4, period=8.0, end_of_thinking=""
    )
    out = model.generate(ids, logits_processor=[processor], **given)[:, 3:]
    # Raised after 1, 2 and 3 tokens, lowered after 5; at 0 and 4 the model is free.
    assert torch.equal(out[:, 0], plain[:, 3])
    assert bool(torch.isin(out[:, 1:4], torch.tensor([WAIT, SPACED])).all())
    assert not bool(torch.isin(out[:, 5], torch.tensor([WAIT, SPACED])).any())


def test_words_of_several_tokens_are_skipped() -> None:
    assert build().reflection_ids == [WAIT, SPACED]
    spaced = shaper("cyclicreflex", tokenizer=Tokenizer(), words=" wait , but,")
    assert spaced.reflection_ids == [WAIT, SPACED], "spaces around words and empty words are none of the words"
    with pytest.raises(ValueError, match="none of but, Hmm is one token of Tokenizer"):
        shaper("cyclicreflex", tokenizer=Tokenizer(), words="but,Hmm")
    with pytest.raises(ValueError, match="above 0"):
        shaper("cyclicreflex", tokenizer=Tokenizer(), words="wait", period=0.0)
