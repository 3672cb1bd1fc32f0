"""What the cache hands out is what was written, wherever each row's tokens went."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Lfm2Config, LlamaConfig, Qwen2Config

from tokenloom.rollout.cache import MaskedLayer, columns_for, new_masked_cache

HEADS, SIZE = 2, 4


def states(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, rows, HEADS, n, SIZE, generator=generator)
    return key, value


def layer(rows: int) -> MaskedLayer:
    made = MaskedLayer()
    made.count = rows
    return made


def test_columns_come_in_blocks() -> None:
    assert [columns_for(n) for n in (1, 16, 17, 40)] == [16, 16, 32, 48]


def test_tokens_side_by_side_across_the_edge_of_a_block() -> None:
    made = layer(3)
    written = [states(3, n, n) for n in (14, 1, 3)]
    start = 0
    for key, value in written:
        made.columns = start
        keys, values = made.update(key, value)
        start += key.shape[2]
    for got, part in ((keys, 0), (values, 1)):
        assert got.shape[2] == 32
        assert torch.equal(got[:, :, :18], torch.cat([w[part] for w in written], 2))
        assert not got[:, :, 18:].any(), "what nobody wrote must be finite"


def test_rows_at_places_of_their_own_overwrite_and_grow() -> None:
    made = layer(2)
    made.update(*states(2, 15, 0))
    key, value = states(2, 2, 1)
    made.columns = torch.tensor([[3, 4], [15, 16]])
    keys, values = made.update(key, value)
    for got, new, old in ((keys, key, states(2, 15, 0)[0]), (values, value, states(2, 15, 0)[1])):
        assert torch.equal(got[0, :, 3:5], new[0])
        assert torch.equal(got[1, :, 15:17], new[1])
        assert torch.equal(got[1, :, :15], old[1])
        assert torch.equal(got[0, :, 5:15], old[0, :, 5:])


def test_some_rows_at_a_time_then_spread() -> None:
    made = layer(3)
    key, value = states(3, 5, 2)
    for some in (slice(0, 2), slice(2, 4)):
        made.rows = some
        keys, _ = made.update(key[some], value[some])
        assert torch.equal(keys[:, :, :5], key[some])
    made.reorder_cache(torch.tensor([2, 0, 0, 1]))
    made.rows, made.columns = slice(None), 5
    keys, values = made.update(*states(4, 1, 3))
    assert torch.equal(keys[:, :, :5], key[[2, 0, 0, 1]])
    assert torch.equal(values[:, :, :5], value[[2, 0, 0, 1]])


def test_kept_in_the_format_asked_for() -> None:
    made = layer(1)
    made.kept_dtype = torch.bfloat16
    keys, values = made.update(*states(1, 2, 4))
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)


def test_only_layers_that_a_mask_can_describe() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert new_masked_cache(LlamaConfig(**small)) is not None
    windows = Qwen2Config(**small, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert new_masked_cache(windows) is not None
    assert new_masked_cache(Lfm2Config(**small, layer_types=["conv", "full_attention"])) is None
