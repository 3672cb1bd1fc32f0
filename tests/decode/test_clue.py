"""CLUE on a model: deltas are differences of its states where thinking starts and ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom.decode.clue import Clue, think_deltas, thinking_span
from tokenloom.decode.probe import save_tensors

PROMPTS = [[5, 9, 4], [8, 3]]
COMPLETIONS = [[10, 40, 11, 12, 41, 13], [10, 40, 11]]


def test_deltas_are_differences_of_states() -> None:
    model = tiny_llama()
    deltas, whole = think_deltas(model, PROMPTS, COMPLETIONS, start=40, end=41)
    assert deltas.shape == (2, 2, 16)
    assert whole.tolist() == [True, False]
    for found, prompt, completion, (start, end) in zip(deltas, PROMPTS, COMPLETIONS, [(4, 7), (3, 4)], strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[1:]
        torch.testing.assert_close(found, torch.stack([h[0, end] - h[0, start] for h in hidden]), rtol=1e-4, atol=1e-5)


def test_where_thinking_lies() -> None:
    assert thinking_span([1, 40, 40], [7, 41, 41], 40, 41) == (2, 4)
    assert thinking_span([1, 40], [40, 7], 40, 41) == (2, None)
    assert thinking_span([1], [7, 41], 40, 41) == (None, 2)
    assert thinking_span([1], [7], None, None) == (None, None)
    assert thinking_span([1], [41, 40, 7, 41], 40, 41) == (2, 4), "an end before the start ends nothing"
    assert thinking_span([1], [41, 40, 7], 40, 41) == (2, None)
    assert thinking_span([40, 5, 41, 6], [7, 41], 40, 41) == (None, 5), "the thinking of an earlier turn is over"
    with pytest.raises(ValueError, match="at least one token"):
        thinking_span([1], [], 40, 41)


def test_without_tags_thinking_is_the_whole_completion() -> None:
    model = tiny_llama()
    deltas, whole = think_deltas(model, PROMPTS, COMPLETIONS)
    tagged, _ = think_deltas(model, PROMPTS, COMPLETIONS, start=10, end=13)
    torch.testing.assert_close(deltas[0], tagged[0])
    assert whole.tolist() == [True, True]


def test_verdicts_votes_and_files(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    correct = torch.arange(20) % 2 == 0
    deltas = torch.randn(20, 3, 4, generator=g) + torch.where(correct, 4.0, -4.0)[:, None, None]
    clue = Clue.fit(deltas, correct)
    assert torch.equal(clue.scores(deltas) > 0, correct)
    answers = ["right" if c else "wrong" for c in correct.tolist()]
    assert answers[
        clue.choose(["wrong", *answers, "wrong"], torch.cat((deltas[1:2], deltas, deltas[1:2])), m=5) - 1
    ] == ("right")
    clue.save(tmp_path / "clue.safetensors")
    again = Clue.load(tmp_path / "clue.safetensors")
    assert torch.equal(again.scores(deltas), clue.scores(deltas))
    save_tensors({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the centroids"):
        Clue.load(tmp_path / "other.safetensors")
