"""Compiled layers give what the model gives, take trees and ragged rows, and step aside where they cannot serve."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tiny_models import TINY, tiny_llama
from tokenloom.decode.session import ROOT, open_session
from tokenloom.rollout.cache import MaskedLayer, Place
from tokenloom.rollout.lean import lean_modules
from tokenloom.rollout.native import block, build
from tokenloom.rollout.native.block import CompiledLayer, linear
from tokenloom.rollout.native.session import largest_scores, move
from tokenloom.rollout.native.weights import Space

FORMATS = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(build.library() is None, reason="no compiled layers on this machine")
SIZES = {
    "hidden": 64,
    "intermediate_size": 112,  # no multiple of 32
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
NAMES = ("llama", "qwen2", "qwen3", "mistral")


def model_of(name: str, **more: Any) -> Any:
    sizes = SIZES | more
    if name == "qwen2":  # its heads always share the width between them
        sizes = {k: v for k, v in sizes.items() if k != "head_dim"} | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    model = TINY[name](vocab=97, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that are not all ones and zeros
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def casts(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()


def served(dtype: torch.dtype) -> None:
    if not build.serves(dtype):
        pytest.skip(f"this processor has no products in {dtype}")


def compiled_in(model: nn.Module) -> int:
    return sum(isinstance(getattr(m.__dict__.get("forward"), "form", None), CompiledLayer) for m in model.modules())


class Truth:
    """A model in float64, copied while it is itself, and whether scores are near enough to its own."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self._model = copy.deepcopy(model).double()
        # Three layers of float32 sums of up to 112 terms; of roundings to 8 bits, some dozen to a layer.
        self._tolerance = 2e-5 if dtype == torch.float32 else 0.06

    def near(self, found: Tensor, ids: list[int]) -> bool:
        """Whether `found` are the scores after the last of `ids`."""
        with torch.no_grad():
            expected = self._model(torch.tensor([ids])).logits[0, -1]
        return bool((found.double() - expected).abs().max() <= self._tolerance * expected.abs().max())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_session_on_compiled_layers(name: str, dtype: torch.dtype) -> None:
    """Ragged prompts, single steps, a tree of nodes, its longest path, and more tokens than fit into a chunk."""
    served(dtype)
    model = model_of(name)
    truth = Truth(model, dtype)
    prompts = [[5, 7, 9], [11, 3, 2, 8, 30, 31, 4], [6]]
    with casts(dtype), open_session(model, prompts) as session:
        assert compiled_in(model) == 3
        for scores, row in zip(session.start(), prompts, strict=True):
            assert truth.near(scores, row)
        for token in (12, 40):
            scores = session.step(torch.tensor([token, token + 1, token + 2]))
            for found, ids in zip(scores, session.rows, strict=True):
                assert truth.near(found, ids)
        nodes = torch.tensor([[1, 2, 3, 4]]).repeat(3, 1)
        tried = session.try_nodes(nodes, torch.tensor([[ROOT, 0, 0, 2]]).repeat(3, 1))
        for row, found in zip(session.rows, tried, strict=True):
            for place, path in enumerate(([1], [1, 2], [1, 3], [1, 3, 4])):
                assert truth.near(found[place], row + path)
        session.accept([[0, 2, 3], [0], []])
        long = torch.randint(0, 97, (3, 70), generator=torch.Generator().manual_seed(0)).tolist()
        for found, ids in zip(session.extend(long), session.rows, strict=True):
            assert truth.near(found, ids)
    assert compiled_in(model) == 0


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_rows_are_filled_up_with_costs_nothing(dtype: torch.dtype) -> None:
    """Only the nodes that count are computed, with trees of 3, 0 and 1 nodes beside the roots."""
    served(dtype)
    model = model_of("qwen3")
    truth = Truth(model, dtype)
    with casts(dtype), open_session(model, [[5, 7, 9], [11, 3, 2, 8], [6]]) as session:
        session.start()
        assert session.ragged
        nodes = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5], [6, 7, 7, 7]])
        parents = torch.tensor([[ROOT, 0, 0, 2], [ROOT] * 4, [ROOT, 0, ROOT, ROOT]])
        tried = session.try_nodes(nodes, parents, [4, 1, 2])
        paths = [[[1], [1, 2], [1, 3], [1, 3, 4]], [[5]], [[6], [6, 7]]]
        for row, found, own in zip(session.rows, tried, paths, strict=True):
            for place, path in enumerate(own):
                assert truth.near(found[place], row + path)
            assert not found[len(own) :].any()
        session.accept([[0, 2], [0], [0, 1]])
        for found, ids in zip(session.step(torch.tensor([20, 21, 22])), session.rows, strict=True):
            assert truth.near(found, ids)


def test_more_than_a_chunk_of_tokens_at_once() -> None:
    """The rows of a product are taken in parts once they exceed 256 KB: 1,024 tokens of width 64."""
    model = model_of("llama", max_position_embeddings=2048)
    ids = torch.randint(0, 97, (1, 1500), generator=torch.Generator().manual_seed(0))[0].tolist()
    truth = Truth(model)
    with open_session(model, [ids]) as session:
        assert truth.near(session.start()[0], ids)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("outputs", [1, 31, 97, 128])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 12, 13, 40])
def test_a_product(rows: int, outputs: int, dtype: torch.dtype) -> None:
    served(dtype)
    torch.manual_seed(rows * outputs)
    layer, x = nn.Linear(48, outputs, bias=False), torch.randn(2, rows, 48)
    found = linear(layer, dtype)(x)
    expected = x.to(dtype).double() @ layer.weight.to(dtype).double().T
    assert found.shape == (2, rows, outputs)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_products_of_many_rows_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with matrix units: long pieces go through the layer itself, short ones are compiled code."""
    served(torch.bfloat16)
    monkeypatch.setattr(block, "most_rows", lambda _: 12)
    model = model_of("qwen2")
    truth = Truth(model, torch.bfloat16)
    long = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    with casts(torch.bfloat16), open_session(model, [[5, 7, 9], [11, 3, 2, 8]]) as session:
        assert compiled_in(model) == 3
        session.start()
        for scores in (session.step(torch.tensor([1, 2])), session.extend(long), session.step(torch.tensor([3, 4]))):
            assert scores.isfinite().all()
        for found, ids in zip(scores, session.rows, strict=True):
            assert truth.near(found, ids)


def test_layers_that_someone_listens_to_are_left_as_they_are() -> None:
    model = model_of("llama")
    truth, heard = Truth(model), list[int]()
    with open_session(model, [[5, 7]]) as session:
        session.start()
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
        scores = session.step(torch.tensor([9]))  # it came after the layers were replaced
        hook.remove()
    assert heard == [1]
    assert truth.near(scores[0], [5, 7, 9])
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with lean_modules(model) as lean:
        assert compiled_in(model) == 2
        assert not lean.compiled
    hook.remove()


def test_layers_are_one_call_unless_something_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    called, call = list[int](), block.call

    def counting(name: str, dtype: torch.dtype | None, *values: Any) -> None:
        if name == "blocks":
            called.append(values[1])
        call(name, dtype, *values)

    monkeypatch.setattr(block, "call", counting)
    model = model_of("llama")
    truth, heard = Truth(model), list[Tensor]()
    with open_session(model, [[5, 7], [3, 2, 8]]) as session:
        called.clear()  # layers were tried one by one
        session.start()
        assert called == [3]
        hook = model.model.layers[1].register_forward_hook(lambda _, __, output: heard.append(output.clone()))
        scores = session.step(torch.tensor([9, 4]))  # what comes between layers is that layer's own
        hook.remove()
        assert called == [3, 1, 1, 1]
        for found, ids in zip(scores, session.rows, strict=True):
            assert truth.near(found, ids)
        session.step(torch.tensor([9, 4]))
        assert called == [3, 1, 1, 1, 3]
    with torch.no_grad():
        between = model(torch.tensor([[5, 7, 9]]), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(heard[0][0, 0], between[0, -1], atol=1e-4)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = model_of("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    truth = Truth(model)
    with open_session(model, [list(range(10, 20))]) as session:
        called.clear()
        assert truth.near(session.start()[0], session.rows[0])
    assert called == [1, 1, 1]


def test_a_trunk_that_does_more_than_its_layers_is_not_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled embeddings, something behind the norm, or a configuration that has it return more."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def changed(self: Any, *args: Any, **given: Any) -> Any:
        if self.kind == "scaled":
            given["inputs_embeds"] = 2.0 * self.embed_tokens(given.pop("input_ids"))
        output = forward(self, *args, **given)
        if self.kind == "more":
            output.last_hidden_state = output.last_hidden_state + 1.0
        return output

    monkeypatch.setattr(LlamaModel, "forward", changed)
    for kind in ("as ever", "scaled", "more", "telling"):
        model = model_of("llama")
        model.model.kind, model.config.output_hidden_states = kind, kind == "telling"
        truth = Truth(model)
        with open_session(model, [[5, 7, 9]]) as session:
            assert kind == "telling" or compiled_in(model) == 3
            assert ("forward" in model.model.__dict__) == (kind == "as ever")
            assert truth.near(session.start()[0], [5, 7, 9])


def test_parts_that_are_exchanged_during_a_session_count() -> None:
    """The norm, a layer, the number of layers: what the model would give now, it gives."""

    def norm(model: Any) -> None:
        model.model.norm = nn.Identity()

    def layer(model: Any) -> None:
        model.model.layers[1] = copy.deepcopy(model.model.layers[0])

    def fewer(model: Any) -> None:
        model.config.num_hidden_layers = 2

    for change in (norm, layer, fewer):
        model = model_of("llama")
        with open_session(model, [[5, 7]]) as session:
            before = session.start()
            change(model)
            session.crop([1])
            after = session.extend([[7]])
        assert not torch.allclose(before, after, atol=1e-3)


def test_a_last_norm_whose_weight_does_not_lie_in_one_piece() -> None:
    model = model_of("llama")
    model.model.norm.weight = nn.Parameter(torch.rand(128, generator=torch.Generator().manual_seed(0))[::2])
    truth = Truth(model)
    with open_session(model, [[5, 7]]) as session:
        assert "forward" in model.model.__dict__
        assert truth.near(session.start()[0], [5, 7])


def test_rotary_positions_that_take_other_arguments_are_left_to_the_model() -> None:
    model = model_of("llama")
    forward, inside = model.model.rotary_emb.forward, list[bool]()

    def asked(*args: Any, **given: Any) -> Any:
        if not inside:
            raise TypeError("missing 1 required argument: 'layer_type'")
        return forward(*args, **given)

    model.model.rotary_emb.forward = asked
    model.model.register_forward_pre_hook(lambda *_: inside.append(True))
    model.model.register_forward_hook(lambda *_: inside.pop() and None)
    with open_session(model, [[5, 7]]) as session:
        assert session.start().isfinite().all()


def test_tokens_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more of them come than compiled code is for."""
    monkeypatch.setattr(block, "most_rows", lambda _: 12)
    model = model_of("llama")
    embedded = list[int]()
    with open_session(model, [list(range(20))]) as session:
        model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1) and None)
        session.start()
        session.step(torch.tensor([3]))
    assert len(embedded) == 2


def test_layers_that_were_taken_out_since_are_not_computed() -> None:
    model = model_of("llama")
    with open_session(model, [[5, 7]]) as session:
        session.start()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    truth = Truth(model)
    with open_session(model, [[5, 7]]) as session:
        assert truth.near(session.start()[0], [5, 7])


def test_what_a_session_is_asked_for_beside_scores() -> None:
    """More than the last hidden states, or tuples, come from the model's own code."""
    model = model_of("qwen3")
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad(), lean_modules(model):
        output = model(ids, output_hidden_states=True, use_cache=True)
        assert len(output.hidden_states) == 4
        assert len(model(ids, return_dict=False)) == 2
        # A cache that is given its layers as they come.
        expected = model(ids).logits
        assert torch.allclose(model(ids, past_key_values=DynamicCache(), use_cache=True).logits, expected, atol=1e-5)


def test_a_layer_of_another_function_or_size_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    odd = [model_of("llama", head_dim=24), model_of("llama", hidden_act="relu"), model_of("llama").double()]
    for model in (*odd, tiny_llama()):
        with lean_modules(model) as lean:
            assert compiled_in(model) == 0
            assert not lean.compiled
    original = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, *a, **k: 1.01 * original(self, *a, **k)
    )
    model = model_of("llama")
    with lean_modules(model):
        assert compiled_in(model) == 0


def test_what_is_not_a_number_stays_so() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with open_session(model, [[5, 7], [5, 6]]) as session:
        scores = session.start()
    assert scores[0].isnan().all()
    assert scores[1].isfinite().all()


def test_without_a_compiler_decoding_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path))
    load = build.found.__wrapped__
    monkeypatch.setenv("CXX", "false")
    assert load()[0] is None
    assert "did not compile" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    assert load() == (None, "they need a C++ compiler, such as g++")
    monkeypatch.undo()
    monkeypatch.setenv("TOKENLOOM_NATIVE", "0")
    assert load() == (None, "switched off by TOKENLOOM_NATIVE=0")
    monkeypatch.setattr(block, "serves", lambda _: False)
    model = model_of("llama")
    truth = Truth(model)
    with open_session(model, [[5, 7]]) as session:
        assert compiled_in(model) == 0
        assert truth.near(session.start()[0], [5, 7])


@pytest.mark.parametrize("vocabulary", [3, 64, 1000, 1153])
def test_the_largest_scores_come_in_order_and_of_equal_ones_the_first(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    for scores in (torch.randn(4, vocabulary), torch.randint(0, 5, (4, vocabulary)).float()):
        scores[1, : vocabulary // 2] = -torch.inf
        for count in {1, min(8, vocabulary), min(vocabulary, 40)}:
            found = largest_scores(scores, count)
            assert found is not None
            expected = scores.sort(dim=-1, descending=True, stable=True)
            assert torch.equal(found[0], expected.values[:, :count])
            assert torch.equal(found[1], expected.indices[:, :count])
    broken = torch.full((1, vocabulary), torch.nan)
    found = largest_scores(broken, 2)
    assert found is not None
    assert found[1].tolist() == [[0, 1]]
    assert largest_scores(broken.double(), 2) is None
    assert largest_scores(broken, vocabulary + 1) is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_not_a_number_is_the_largest(count: int) -> None:
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    scores[0, [3, 250]] = scores[1, 299] = torch.nan
    found = largest_scores(scores, count)
    assert found is not None
    assert found[1][:, 0].tolist() == scores.argmax(-1).tolist()
    torch.testing.assert_close(found[0], scores.topk(count).values, equal_nan=True)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_format_of_new_tensors_is_nobody_elses_choice(default: torch.dtype) -> None:
    model = model_of("qwen2")  # its projections have biases, its output none
    truth = Truth(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with open_session(model, [[5, 7, 9]]) as session:
            assert truth.near(session.start()[0], [5, 7, 9])
        found = largest_scores(torch.arange(90, dtype=torch.float32)[None], 2)
    finally:
        torch.set_default_dtype(before)
    assert found is not None
    assert found[0].tolist() == [[89.0, 88.0]]


@pytest.mark.parametrize("dtype", FORMATS)
def test_columns_move_one_after_another(dtype: torch.dtype) -> None:
    served(dtype)
    torch.manual_seed(0)
    source, target = torch.tensor([[2, 4, 5], [1, 1, 7]]), torch.tensor([[1, 2, 3], [0, 1, 2]])

    def layers() -> list[MaskedLayer]:
        torch.manual_seed(0)
        made = [MaskedLayer(Place(length=8), 2, dtype=dtype, transposed=True, block=16) for _ in range(3)]
        for layer in made:
            layer.write(torch.randn(2, 8, 3, 32), torch.randn(2, 8, 3, 32))
        return made

    ours, theirs = layers(), layers()
    assert move(ours, source, target)
    for layer in theirs:
        for i in range(3):
            layer.move(source[:, i : i + 1], target[:, i : i + 1])
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
    lying = MaskedLayer(Place(length=8), 2, dtype=dtype, transposed=False, block=16)
    assert not move([lying], source, target)
    empty = MaskedLayer(Place(length=8), 2, dtype=dtype, transposed=True, block=16)
    assert not move([ours[0], empty], source, target)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_room_for_weights_is_nobody_elses(in_chunks: bool) -> None:
    space = Space(in_chunks=in_chunks)
    taken = [space.take(count) for count in (64, 40 << 20, 96, 32)]
    for value, part in enumerate(taken):
        assert part.data_ptr() % 64 == 0
        part[:64] = value
    assert [int(part[0]) for part in taken] == [0, 1, 2, 3]
    assert [len(part) for part in taken] == [64, 40 << 20, 96, 32]
