"""VISTA on models: identity at zero, hooks gone afterwards, what is mixed in, directions, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama, tiny_phi
from tokenloom import decode
from tokenloom.decode.layers import decoder_layers
from tokenloom.decode.vista import context_directions, vista

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[2:]).logits
    return found


@pytest.mark.parametrize("name", sorted(TINY))
def test_zero_is_the_model_and_the_last_layer_alone_is_its_logits(name: str) -> None:
    model = TINY[name]()
    before = logits(model)
    directions = context_directions(model, [[5, 6, 7, 8]], [[7, 8]])
    with vista(model, directions, strength=0.0, gamma=0.0):
        assert torch.equal(logits(model), before)
    with vista(model, directions, strength=0.0, gamma=0.7, first=1, last=1):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    with vista(model, directions, strength=0.3):
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(model), before)


def test_what_is_mixed_in_is_the_head_on_the_residual_stream() -> None:
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():
        states = model(input_ids=IDS[2:], output_hidden_states=True).hidden_states
        late = torch.stack([model.lm_head(states[i + 1]) for i in (1, 2)])
    expected = 0.6 * logits(model) + 0.4 * late.mean(0)
    with vista(model, torch.zeros(4, 16), gamma=0.4, first=1, last=2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_directions_are_differences_after_each_layer() -> None:
    model = tiny_llama(num_hidden_layers=3)
    found = context_directions(model, [[5, 6, 7, 8]], [[7, 8]])
    with torch.no_grad():
        states = [
            model(input_ids=torch.tensor([p]), output_hidden_states=True).hidden_states for p in ([5, 6, 7, 8], [7, 8])
        ]
    for layer in range(2):  # the last one's states come behind the final norm there
        torch.testing.assert_close(found[layer], states[0][layer + 1][0, -1] - states[1][layer + 1][0, -1])


def test_dropout_has_no_part_in_directions() -> None:
    model = tiny_phi()
    expected = context_directions(model, [[5, 6, 7, 8]], [[7, 8]])
    assert torch.equal(context_directions(model.train(), [[5, 6, 7, 8]], [[7, 8]]), expected)
    assert model.training


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_loop_is_generate_under_the_hooks_padded_or_not(name: str) -> None:
    model = TINY[name](seed=3)
    directions = context_directions(model, [[5, 6, 7, 8], [9, 9, 4]], [[7, 8], [9, 4]])
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 8}
    loop = decode.loop("vista", directions=directions, strength=0.4)
    ours = model.generate(IDS, custom_generate=loop, **given)
    with vista(model, directions, strength=0.4):
        assert torch.equal(ours, model.generate(IDS, **given))
    assert not torch.equal(ours, model.generate(IDS, **given))
    assert not any(m._forward_hooks for m in model.modules())


def test_refusals() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"\[2, 16\]"), vista(model, torch.zeros(3, 16)):
        pass
    with pytest.raises(ValueError, match="layers 1 to 5"), vista(model, torch.zeros(2, 16), first=1, last=5):
        pass
    with pytest.raises(ValueError, match="counterpart"):
        context_directions(model, [[4]], [])
    assert len(decoder_layers(model)) == 2
    with pytest.raises(ValueError, match="are a tensor"):
        decode.loop("vista", directions="directions.pt")
