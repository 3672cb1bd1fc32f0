"""Sampling leaves no trace in the model, in autocast's cache or in the training step that follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.stand_in import StandIn, full_logprobs
from tiny_models import tiny_llama, tiny_phi
from tokenloom.batch import Sampling
from tokenloom.rollout import generate

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
SAMPLING = Sampling(max_tokens=6, seed=0)


class CastsOfWeights(TorchDispatchMode):
    """Counts conversions of parameters to bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self.weights
        if func is torch.ops.aten.copy_.default and args[0].dtype == torch.bfloat16:
            self.count += args[1].data_ptr() in self.weights
        return func(*args, **kwargs)


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("frozen", [False, True], ids=["all weights", "LoRA"])
def test_each_weight_is_cast_once_per_call(frozen: bool) -> None:
    model = lora(tiny_llama()) if frozen else tiny_llama()
    needs_gradient = {n: p.requires_grad for n, p in model.named_parameters()}
    with CastsOfWeights(model) as casts:
        generate(StandIn(model, ends=(), bf16=True), PROMPTS, SAMPLING, copies=3)
    assert 0 < casts.count <= len(list(model.parameters()))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needs_gradient


def test_lora_logprobs_equal_a_full_forward() -> None:
    model = lora(tiny_llama())
    out = generate(StandIn(model, ends=()), PROMPTS, SAMPLING, copies=2)
    expected = full_logprobs(model, PROMPTS[1], out.response(3))
    assert torch.allclose(out.sampler_logprobs[3], expected, atol=1e-5)


def test_later_updates_and_gradients_see_no_stale_casts_even_inside_an_open_autocast_region() -> None:
    model = tiny_llama()
    policy = StandIn(model, ends=(), bf16=True)
    greedy = Sampling(temperature=0, max_tokens=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(policy, PROMPTS, greedy, copies=1)
        loss = model(PROMPTS[0][None]).logits.float().logsumexp(-1).sum()
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "norm" not in n)
        with torch.no_grad():
            model(PROMPTS[0][None])  # casts of the weights before the update, kept by the open region
            for p in model.parameters():
                p.sub_(0.3 * p.grad if p.grad is not None else 0.0)
        changed = generate(policy, PROMPTS, greedy, copies=1)
    fresh = generate(policy, PROMPTS, greedy, copies=1)
    assert torch.equal(changed.tokens, fresh.tokens)
    assert torch.equal(changed.sampler_logprobs, fresh.sampler_logprobs)


def test_an_open_autocast_region_is_left_without_casts() -> None:
    model = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        generate(StandIn(model, ends=(), bf16=True), PROMPTS, SAMPLING, copies=1)
        for p in model.parameters():
            p.mul_(0.5)
        after = model(PROMPTS[0][None]).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(model(PROMPTS[0][None]).logits, after)


def test_bf16_logprobs_equal_the_same_autocast_forward() -> None:
    policy = StandIn(tiny_llama(), ends=(), bf16=True)
    out = generate(policy, PROMPTS, SAMPLING, copies=2)
    assert out.sampler_logprobs.dtype == torch.float32
    with policy.autocast():
        expected = full_logprobs(policy.model, PROMPTS[0], out.response(0)).float()
    # bfloat16 has 8 bits and logits up to 4 here; the two forwards batch their products differently.
    assert torch.allclose(out.sampler_logprobs[0], expected, atol=0.1)


def test_modes_are_put_back_and_dropout_is_off() -> None:
    model = tiny_phi().train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    policy = StandIn(model, ends=())
    first = generate(policy, PROMPTS, SAMPLING, copies=2)
    second = generate(policy, PROMPTS, SAMPLING, copies=2)
    assert torch.equal(first.sampler_logprobs, second.sampler_logprobs), "dropout must be off"
    assert [m.training for m in model.modules()] == before
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.eval()
    expected = full_logprobs(model, PROMPTS[0], first.response(0))
    assert torch.allclose(first.sampler_logprobs[0], expected, atol=1e-5)


def test_results_can_enter_a_backward() -> None:
    model = tiny_llama()
    out = generate(StandIn(model, ends=()), PROMPTS, SAMPLING, copies=1)
    assert not out.sampler_logprobs.is_inference()
    logits = model(out.tokens).logits
    (logits.log_softmax(-1).gather(-1, out.tokens[..., None])[..., 0] * out.sampler_logprobs).sum().backward()


def test_modes_are_put_back_after_an_error() -> None:
    model = tiny_llama().train()
    with pytest.raises(RuntimeError, match="stop here"):
        generate(StandIn(model, bf16=True), PROMPTS, SAMPLING, copies=1, shape_logits=_fail)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def _fail(_logits: torch.Tensor, _step: int) -> torch.Tensor:
    raise RuntimeError("stop here")
