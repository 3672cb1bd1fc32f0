"""Lean forms stand in where they fit, give the same numbers, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama import modeling_llama

from tiny_models import TINY, tiny_llama
from tokenloom.policy.lean_training import forms_that_fit
from tokenloom.rollout.lean import lean_modules

IDS = torch.arange(14).view(2, 7)
LEAN = {"llama", "qwen2", "qwen3", "gemma3", "mistral", "granite"}
"""Rotary halves, plain scores: Gemma-2 caps its scores, Phi turns a part of each head, Cohere turns neighbors."""


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_logits_and_no_trace(name: str, dtype: torch.dtype) -> None:
    model = TINY[name]().to(dtype)
    with torch.no_grad():
        expected = model(IDS).logits
        with lean_modules(model) as lean:
            changed = sum("forward" in m.__dict__ for m in model.modules())
            found = model(IDS).logits
        assert lean.attention == (name in LEAN)
        if name in LEAN:
            assert changed >= 5
        # Two layers and a head: sums of up to 64 terms of size one, in another order.
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 1e-12)
        assert not any("forward" in m.__dict__ for m in model.modules())
        assert torch.equal(model(IDS).logits, expected)


def test_traces_are_removed_after_an_error_and_what_was_there_comes_back() -> None:
    model = tiny_llama()
    own = model.model.norm.forward
    model.model.norm.__dict__["forward"] = own
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), lean_modules(model):
        raise RuntimeError("stop")
    assert model.model.norm.__dict__.pop("forward") is own
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_copy_runs_on_its_own_weights_and_becomes_lean_itself() -> None:
    sizes = {"hidden": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}  # of compiled layers too
    model = tiny_llama(**sizes)
    with torch.no_grad(), lean_modules(model):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        found = other(IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert torch.equal(found, model(IDS).logits)
        with lean_modules(other) as lean:
            assert lean.attention
            assert torch.allclose(other(IDS).logits, found, atol=1e-5)
    assert forms_that_fit(other, None)


@pytest.mark.parametrize("where", ["norm", "turn", "mlp", "order"])
def test_a_module_that_does_something_else_is_left_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "norm":
        original = modeling_llama.LlamaRMSNorm.forward
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: original(self, x) * 1.01)
    elif where == "turn":
        monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: x)
    elif where == "mlp":
        original_mlp = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: original_mlp(self, x).tanh())
    else:
        original_layer = modeling_llama.LlamaDecoderLayer.forward
        monkeypatch.setattr(
            modeling_llama.LlamaDecoderLayer, "forward", lambda self, *a, **k: 0.9 * original_layer(self, *a, **k)
        )
    model = tiny_llama()
    with torch.no_grad():
        expected = model(IDS).logits
        with lean_modules(model) as lean:
            found = model(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert lean.attention == (where != "turn")


def test_attention_changed_later_is_not_replaced() -> None:
    model = tiny_llama()
    with torch.no_grad(), lean_modules(model) as lean:
        assert lean.attention
    model.set_attn_implementation("eager")
    with torch.no_grad(), lean_modules(model) as lean:
        assert not lean.attention
