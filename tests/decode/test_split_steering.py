"""Steering vectors on models: the vector is a shift of the bias, losses are those of rows alone, training works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama, tiny_phi
from tokenloom import decode
from tokenloom.decode.split_steering import Pair, continuation_losses, fit_vector, pair_log_odds, steering

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
PAIRS = [Pair([4, i], [20, 21], [40, 41, 42]) for i in range(5, 11)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[2:]).logits
    return found


def test_the_vector_is_a_shift_of_the_bias() -> None:
    model = tiny_llama(mlp_bias=True)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    base = logits(model)
    with steering(model, vector, layer=1, multiplier=3.0):
        steered = logits(model)
    with steering(model, vector, layer=1, multiplier=0.0):
        assert torch.equal(logits(model), base)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias += 3.0 * vector
    torch.testing.assert_close(logits(model), steered, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steered, base, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_loop_is_generate_under_the_hook(name: str) -> None:
    model = TINY[name](seed=4)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 8}
    loop = decode.loop("split-steering", vector=vector, layer=0, multiplier=2.0)
    ours = model.generate(IDS, custom_generate=loop, **given)
    with steering(model, vector, layer=0, multiplier=2.0):
        assert torch.equal(ours, model.generate(IDS, **given))
    assert not torch.equal(ours, model.generate(IDS, **given))


def test_a_vector_of_another_model_is_refused_before_it_is_added() -> None:
    # One number would be added to every dimension without a word.
    for vector in (torch.ones(1), torch.ones(17), torch.ones(2, 16)):
        loop = decode.loop("split-steering", vector=vector, layer=0)
        with pytest.raises(ValueError, match=r"must be \[16\]"):
            tiny_llama().generate(IDS, attention_mask=MASK, max_new_tokens=2, custom_generate=loop)
    with pytest.raises(ValueError, match="is a tensor"):
        decode.loop("split-steering", vector="vector.pt")


def test_losses_of_a_padded_batch_are_those_of_rows_alone() -> None:
    model = tiny_llama()
    prompts, continuations = [[5, 9, 4], [8], [3, 3, 3, 3]], [[7, 11], [12, 13, 14, 15], [6]]
    together = continuation_losses(model, prompts, continuations, mean=False)
    for i, (p, c) in enumerate(zip(prompts, continuations, strict=True)):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([p + c])).logits[0].log_softmax(-1)
        alone = -sum(scores[len(p) - 1 + k, token] for k, token in enumerate(c))
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)
    means = continuation_losses(model, prompts, continuations)
    torch.testing.assert_close(means, together / torch.tensor([2, 4, 1]), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at least one token"):
        continuation_losses(model, [[4]], [[]])


def test_dropout_has_no_part_in_log_odds() -> None:
    model = tiny_phi()
    expected = pair_log_odds(model, PAIRS)
    assert all(map(torch.equal, pair_log_odds(model.train(), PAIRS), expected))
    assert model.training


def test_training_raises_the_preference_and_touches_nothing_else() -> None:
    model = tiny_llama(seed=5)
    model.train()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before, _ = pair_log_odds(model, PAIRS)
    shown: list[int] = []
    settings: dict[str, Any] = {"layer": 1, "epochs": 20, "multipliers": (1.0, 2.0), "seed": 3}
    vector, history = fit_vector(model, PAIRS, progress=lambda step, _: shown.append(step), **settings)
    assert model.training
    assert len(history) == 40
    assert shown == list(range(1, 41))
    assert history[-1] < history[0]
    with steering(model, vector, layer=1, multiplier=2.0):
        after, _ = pair_log_odds(model, PAIRS)
    assert bool((after > before + 1).all())
    assert all(torch.equal(p, weights[n]) and p.requires_grad and p.grad is None for n, p in model.named_parameters())
    again, _ = fit_vector(model, PAIRS, **settings)
    assert torch.equal(vector, again)


def test_the_reference_term_and_refusals() -> None:
    model = tiny_llama(seed=5)
    free, _ = fit_vector(model, PAIRS[:2], layer=0, epochs=1)
    held, _ = fit_vector(model, PAIRS[:2], layer=0, epochs=3, weight_reference=5.0)
    assert bool(held.isfinite().all())
    assert not torch.equal(free, held)
    with pytest.raises(ValueError, match="layers 0 to 1"), steering(model, free, layer=2):
        pass
    with pytest.raises(ValueError, match="pairs"):
        fit_vector(model, [], layer=0)
