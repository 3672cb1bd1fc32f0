"""Rectification in generate: safe values change nothing, dead ends are told, values are learned from texts."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.rectification import Rectification, fit, value_model
from tokenloom.methods.decoding.rectification import rectify

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
GIVEN = {"attention_mask": (IDS != 2).long(), "do_sample": False, "max_new_tokens": 6}


def test_safe_values_change_nothing() -> None:
    model = tiny_llama()
    shaper = decode.shaper("rectification", values=value_model(tiny_llama(seed=3), 64), epsilon=0.0)
    assert torch.equal(model.generate(IDS, logits_processor=[shaper], **GIVEN), model.generate(IDS, **GIVEN))
    assert shaper.dead_ends == 0


def test_the_shaper_is_the_rule_on_the_models_values() -> None:
    values = value_model(tiny_llama(vocab=12, seed=3), 12)
    with torch.no_grad():
        values.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        expected = torch.stack([values(input_ids=torch.tensor([p])).logits[0, -1] for p in ([5, 9, 4], [8, 3, 11, 6])])
    scores = 3 * torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    found = Rectification(values)(IDS, scores)
    torch.testing.assert_close(found, rectify(scores, expected), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, scores)


def test_dead_ends_warn_once_and_count() -> None:
    values = value_model(tiny_llama(vocab=12, seed=3), 12)
    shaper = Rectification(values)
    scores = torch.zeros(2, 12)
    scores[0, 1:] = -torch.inf  # one token is left, and its cap is 0.9
    with pytest.warns(UserWarning, match="dead end"):
        found = shaper(IDS, scores)
    assert found[0].softmax(-1)[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shaper(IDS, scores)
    assert shaper.dead_ends == 2


def test_ids_that_fill_up_the_vocabulary_are_no_way_out() -> None:
    shaper = Rectification(value_model(tiny_llama(vocab=200, seed=3), 200))
    scores = torch.full((1, 202), -torch.inf)
    scores[0, [7, 200, 201]] = torch.tensor([1.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match="dead end"):
        found = shaper(IDS[:1], scores)
    assert float(found.softmax(-1)[0, 200:].sum()) < 1e-6


def test_values_of_undesired_tokens_are_learned() -> None:
    # A text is undesired iff it has token 5, which then dooms what follows.
    values = value_model(tiny_llama(vocab=12, seed=4), 12)
    g = torch.Generator().manual_seed(0)
    prompts = [[3 + i % 2] for i in range(96)]
    completions = torch.randint(5, 9, (96, 3), generator=g).tolist()
    fit(values, prompts, completions, [5 in c for c in completions], epochs=40, batch=32, learning_rate=1e-2)
    with torch.no_grad():
        found = values(input_ids=torch.tensor([[3, 5], [3, 6]])).logits
    first, doomed, safe = found[0, 0, 5:9], found[0, 1, 5:9], found[1, 1, 5:9]
    assert float(first[0]) < -0.8
    assert bool((doomed < -0.7).all())
    assert float(safe[0]) < -0.7
    # Three tokens left to go wrong with 1 - (3/4)^2 behind the first, with 1/4 behind the second.
    assert first[1:].tolist() == pytest.approx([-7 / 16] * 3, abs=0.25)
    assert safe[1:].tolist() == pytest.approx([-1 / 4] * 3, abs=0.25)


def test_mistakes_are_named() -> None:
    values = value_model(tiny_llama(vocab=12), 12)
    with pytest.raises(ValueError, match="rounds >= 1"):
        Rectification(values, rounds=0)
    with pytest.raises(ValueError, match=r"label in \[0, 1\]"):
        fit(values, [[3]], [[4]], [2.0])
    with pytest.raises(ValueError, match="none of them empty"):
        fit(values, [[]], [[4]], [True])
