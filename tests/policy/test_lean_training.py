"""Lean training forms: exact gradients, the models' own signals, and modules that are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from full_logits import ragged_rollouts
from tiny_models import TINY, tiny_llama
from tokenloom.policy import ModelConfig, Policy
from tokenloom.policy.lean_training import _Cast, _Gate, _Norm


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 4), (0, 3), (1, 1)])
def test_the_norm_has_the_gradient_of_its_definition(shifted: bool, shape: tuple[int, ...]) -> None:
    x, w = values(*shape), values(shape[-1], seed=1)
    assert torch.autograd.gradcheck(lambda x, w: _Norm.apply(x, w, 1e-3, shifted), (x, w))
    scale = 1 + w if shifted else w
    expected = scale * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(_Norm.apply(x, w, 1e-3, shifted), expected, rtol=1e-9, atol=1e-12)


def test_the_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x, w = torch.zeros(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = _Norm.apply(x, w, 1e-6, False)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 3))
    assert x.grad is not None
    assert w.grad is not None
    # r = 1/sqrt(eps), and nothing lies along x.
    torch.testing.assert_close(x.grad, torch.full((2, 3), 1e3))
    assert torch.equal(w.grad, torch.zeros(3))


def test_the_gate_has_the_gradient_of_its_definition() -> None:
    a, b = values(3, 4), values(3, 4, seed=1)
    assert torch.autograd.gradcheck(_Gate.apply, (a, b))
    torch.testing.assert_close(_Gate.apply(a, b), a * torch.sigmoid(a) * b, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_shared_cast_are_added_in_the_wide_format() -> None:
    x = torch.ones(4, requires_grad=True)
    first, second = _Cast.apply(x, torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    # In bfloat16 the sum would be 256.
    torch.autograd.backward([first, second], [torch.full((4,), 256.0).bfloat16(), torch.ones(4).bfloat16()])
    assert x.grad is not None
    assert x.grad.tolist() == [257.0] * 4


def trained(name: str, lean: bool, **settings: Any) -> tuple[Policy, Tensor]:
    model = TINY[name]().to(getattr(torch, settings.get("dtype", "float32")))
    policy = Policy(model, config=ModelConfig(self_test=False, **settings))
    if not lean:
        policy._lean_forms = []
    logprobs = policy.signals(ragged_rollouts(), ["logprobs"], grad=True).named()["logprobs"]
    policy.backward((logprobs * logprobs.detach()).sum())
    return policy, logprobs.detach()


@pytest.mark.parametrize("settings", [{}, {"autocast": "bf16"}, {"lora": {"rank": 2}}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_models_train_as_with_their_own_code(name: str, settings: Any) -> None:
    plain, expected = trained(name, False, **settings)
    lean, found = trained(name, True, **settings)
    norms = [m for m in lean.causal.modules() if type(m).__name__.endswith("RMSNorm")]
    gates = [m for m in lean.causal.modules() if hasattr(m, "gate_proj")]
    # Gemma's gate is another function.
    tables = [m for m in lean.causal.modules() if type(m) is nn.Embedding]  # Gemma's is scaled
    assert {m for m, _ in lean._lean_forms} == {*norms, *tables, *(gates if name != "gemma3" else ())}
    assert not any("forward" in m.__dict__ for m in (*norms, *gates))
    half = bool(settings.keys() & {"autocast", "dtype"})
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if half else 1e-5)
    for (key, p), (_, q) in zip(plain.trainable_parameters(), lean.trainable_parameters(), strict=True):
        assert p.grad is not None, key
        assert q.grad is not None, key
        scale = max(float(p.grad.abs().max()), 1e-3)
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=scale * (5e-2 if half else 1e-5))


def test_hooks_on_linear_layers_and_norms_still_act() -> None:
    policy = Policy(tiny_llama(), config=ModelConfig(self_test=False))
    layer = policy.causal.model.layers[0]
    seen: list[str] = []
    for name, module in (("gate", layer.mlp.gate_proj), ("norm", layer.input_layernorm), ("mlp", layer.mlp)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
    assert seen[-3:] == ["norm", "gate", "mlp"]
    assert layer.mlp in {m for m, _ in policy._lean_forms}


def test_a_module_with_code_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    # The same parts, another function: nothing but the comparison can tell.
    monkeypatch.setattr(second, "act_fn", nn.GELU())
    policy = Policy(model, config=ModelConfig(self_test=False))
    assert first in {m for m, _ in policy._lean_forms}
    assert second not in {m for m, _ in policy._lean_forms}
    calls: list[int] = []
    own = first.forward
    first.forward = lambda x: calls.append(1) or own(x)
    patched = first.forward
    policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
    assert calls
    assert first.forward is patched


def test_a_hook_on_the_activation_keeps_the_models_own_code() -> None:
    policy = Policy(tiny_llama(), config=ModelConfig(self_test=False))
    seen: list[int] = []
    policy.causal.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
    assert seen


def test_what_the_backward_keeps_is_less() -> None:
    def kept(lean: bool) -> int:
        policy = Policy(tiny_llama(), config=ModelConfig(self_test=False, autocast="bf16"))
        if not lean:
            policy._lean_forms = []
        held: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
        return sum(held.values())

    assert kept(True) < kept(False)


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_forms_act_in_every_pass_with_gradient_and_no_other(checkpointing: bool, passes: int) -> None:
    policy = Policy(tiny_llama(), config=ModelConfig(self_test=False, gradient_checkpointing=checkpointing))
    norm = policy.causal.model.layers[0].input_layernorm
    replaced: list[bool] = []
    norm.register_forward_pre_hook(lambda m, _: replaced.append("forward" in m.__dict__))
    policy.signals(ragged_rollouts(), ["logprobs"])
    assert set(replaced) == {False}
    calls = len(replaced)
    policy.backward(policy.signals(ragged_rollouts(), ["logprobs"], grad=True).named()["logprobs"].sum())
    assert replaced[calls:] == [True] * passes * calls
    assert "forward" not in norm.__dict__
