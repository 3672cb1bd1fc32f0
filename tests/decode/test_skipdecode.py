"""SkipDecode on models: all layers give plain decoding, fewer give the model of those layers, batches as rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig

from tests.tiny_models import TINY, build, tiny_llama
from tokenloom import decode
from tokenloom.decode.layers import decoder_layers
from tokenloom.decode.skipdecode import only_layers

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def generated(model: Any, loop: Any, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=9, custom_generate=loop
    )
    return found


@pytest.mark.parametrize("name", sorted(TINY))
def test_all_layers_are_the_model(name: str) -> None:
    model = TINY[name]()
    theirs = model.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=9)
    assert torch.equal(generated(model, decode.loop("skipdecode", least=2)), theirs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_constant_number_is_the_model_of_those_layers(name: str) -> None:
    model = TINY[name](seed=1) if name != "llama" else tiny_llama(seed=1, num_hidden_layers=5)
    total = len(decoder_layers(model))
    kept = [0, *range(total - 1, total)]
    loop = decode.loop("skipdecode", least=2, most=2)
    ours = generated(model, loop)
    if total > 2:
        assert not torch.equal(ours, generated(model, decode.loop("plain")))
        assert loop.last_run.counts["layers_per_token"] == 2
    with only_layers(model, kept):
        assert torch.equal(ours, model.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=9))


def test_falling_schedules_equal_a_run_of_each_row_alone_without_a_cache() -> None:
    model = tiny_llama(seed=2, num_hidden_layers=6, eos_token_id=None)
    layers = list(decoder_layers(model))
    loop = decode.loop("skipdecode", least=2, over=4)
    ours = generated(model, loop)
    assert list(decoder_layers(model)) == layers
    assert loop.last_run.counts["layers_per_token"] == pytest.approx((6 + 5 + 4 + 3 + 2 * 4) / 8)
    for row in range(3):
        alone = IDS[row][MASK[row].bool()][None]
        assert torch.equal(generated(model, loop, alone, torch.ones_like(alone))[0, alone.shape[1] :], ours[row, 5:])


def test_an_executed_layer_has_keys_of_all_earlier_tokens() -> None:
    model = tiny_llama(num_hidden_layers=6, eos_token_id=None)
    one = IDS[2:]
    generated(model, decode.loop("plain"), one, torch.ones_like(one))  # lean forms are found in a forward of their own
    seen: dict[int, list[int]] = {}
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(
            lambda _, args, output, number=number: seen.setdefault(number, []).append(output.shape[1])
        )
    generated(model, decode.loop("skipdecode", least=2, over=4), one, torch.ones_like(one))
    counts = {n: sum(s) for n, s in seen.items()}
    # 5 tokens of the prompt; of 8 further tokens that are read, layer 0 and the last read all.
    assert counts == {0: 13, 1: 6, 2: 7, 3: 8, 4: 9, 5: 13}


def test_layers_that_give_tuples() -> None:
    def bloom(layers: int) -> Any:
        return build(BloomConfig(vocab_size=64, hidden_size=16, n_layer=layers, n_head=2), seed=1)

    model, short = bloom(4), bloom(2)
    weights = {n: w for n, w in model.state_dict().items() if ".h.1." not in n and ".h.2." not in n}
    short.load_state_dict({n.replace(".h.3.", ".h.1."): w for n, w in weights.items()})
    with torch.no_grad(), only_layers(model, [0, 3]):
        torch.testing.assert_close(model(input_ids=IDS).logits, short(input_ids=IDS).logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="skipdecode"):
        generated(tiny_llama(), decode.loop("skipdecode", least=1))
