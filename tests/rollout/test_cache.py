"""What the cache hands out is what was written, wherever each row's tokens went."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from tokenloom.rollout.cache import MaskedLayer, Place, columns_for, new_masked_cache

HEADS, SIZE = 2, 4


def states(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, rows, HEADS, n, SIZE, generator=generator)
    return key, value


def layer(rows: int, place: Place, transposed: bool = False, dtype: torch.dtype | None = None) -> MaskedLayer:
    return MaskedLayer(place, rows, dtype=dtype, transposed=transposed, block=16)


def test_columns_come_in_blocks() -> None:
    assert [columns_for(n, 16) for n in (1, 16, 17, 40)] == [16, 16, 32, 48]


@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_side_by_side_across_the_edge_of_a_block(transposed: bool) -> None:
    made = layer(3, place := Place(), transposed)
    written = [states(3, n, n) for n in (14, 1, 3)]
    start = 0
    for key, value in written:
        place.columns, place.length = start, start + key.shape[2]
        keys, values = made.update(key, value)
        start = place.length
    for got, part in ((keys, 0), (values, 1)):
        assert got.shape[2] == 32
        assert torch.equal(got[:, :, :18], torch.cat([w[part] for w in written], 2))
        assert not got[:, :, 18:].any(), "what nobody wrote must be finite"
    assert keys.transpose(-1, -2).is_contiguous() == transposed
    assert keys.is_contiguous() != transposed
    assert values.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_at_places_of_their_own_overwrite_and_grow(transposed: bool) -> None:
    made = layer(2, place := Place(length=15), transposed)
    made.update(*states(2, 15, 0))
    key, value = states(2, 2, 1)
    place.columns, place.length = torch.tensor([[3, 4], [15, 16]]), 17
    keys, values = made.update(key, value)
    for got, new, old in ((keys, key, states(2, 15, 0)[0]), (values, value, states(2, 15, 0)[1])):
        assert torch.equal(got[0, :, 3:5], new[0])
        assert torch.equal(got[1, :, 15:17], new[1])
        assert torch.equal(got[1, :, :15], old[1])
        assert torch.equal(got[0, :, 5:15], old[0, :, 5:])


@pytest.mark.parametrize("transposed", [False, True])
def test_some_rows_at_a_time_then_spread(transposed: bool) -> None:
    made = layer(3, place := Place(length=5), transposed)
    key, value = states(3, 5, 2)
    for first, last in ((0, 2), (2, 3)):
        place.row = first
        keys, _ = made.update(key[first:last], value[first:last])
        assert torch.equal(keys[:, :, :5], key[first:last])
    made.reorder_cache(torch.tensor([2, 0, 0, 1]))
    place.row, place.columns, place.length = 0, 5, 6
    keys, values = made.update(*states(4, 1, 3))
    assert torch.equal(keys[:, :, :5], key[[2, 0, 0, 1]])
    assert torch.equal(values[:, :, :5], value[[2, 0, 0, 1]])
    assert keys.transpose(-1, -2).is_contiguous() == transposed


def test_kept_in_the_format_asked_for() -> None:
    keys, values = layer(1, Place(length=2), dtype=torch.bfloat16).update(*states(1, 2, 4))
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)


def test_only_layers_that_a_mask_can_describe() -> None:
    def masked(config: PreTrainedConfig) -> bool:
        return new_masked_cache(config, Place(), rows=1, dtype=None, transposed=False, block=1) is not None

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert masked(LlamaConfig(**small))
    assert masked(Qwen2Config(**small, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert not masked(Lfm2Config(**small, layer_types=["conv", "full_attention"]))
