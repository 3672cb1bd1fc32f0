"""The head module: log-probs inside of the call of the model's own head, with its hooks; else the model's own way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tiny_models import tiny_gemma2, tiny_llama, tiny_phi
from tokenloom.kernels import LinearLogprobs
from tokenloom.policy.head import LogprobHead

ROWS = torch.tensor([2, 2, 0, 5, 2, 5, 3])
"""Seven targets on four of six hidden rows."""


def states(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Six hidden rows and seven targets."""
    generator = torch.Generator().manual_seed(1)
    size = model.config.hidden_size
    hidden = torch.randn(6, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, torch.randint(model.config.vocab_size, (7,), generator=generator)


def everything(head: LogprobHead, hidden: Tensor, targets: Tensor) -> LinearLogprobs:
    return head(hidden, targets, rows=ROWS, temperature=0.7, need_entropy=True, top_k=4)


def loss(found: LinearLogprobs) -> Tensor:
    assert found.entropies is not None
    assert found.top is not None
    weights = torch.linspace(-1, 1, 7, dtype=found.logprobs.dtype)
    return (weights * (found.logprobs + found.entropies.square() + found.top.logprobs[:, 2])).sum()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_phi])
def test_fused_and_the_models_own_way_agree(build: Any) -> None:
    """Soft-cap, bias, rows that share and rows without a target; values and gradients, in float64."""
    model = build().double()
    hidden, targets = states(model, torch.float64)
    results = []
    for fused in (True, False):
        head = LogprobHead(model, chunk_rows=3, fused=fused)
        assert head.fused is fused
        found = everything(head, hidden, targets)
        leaves = [hidden, *head.linear.parameters()]  # type: ignore[union-attr]  # these models have a head
        assert found.top is not None
        results.append([*found[:2], found.top.logprobs, found.top.tokens, *torch.autograd.grad(loss(found), leaves)])
    for ours, own in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-9)
    assert results[0][4][[1, 4]].eq(0).all()


@pytest.mark.parametrize("fused", [True, False])
def test_without_rows_target_n_is_that_of_row_n(fused: bool) -> None:
    model = tiny_llama()
    hidden, targets = states(model)
    head = LogprobHead(model, fused=fused)
    found = head(hidden, targets[:6])
    assert found.entropies is None
    assert found.top is None
    wanted = torch.log_softmax(model.lm_head(hidden), -1).gather(-1, targets[:6, None])[:, 0]
    torch.testing.assert_close(found.logprobs, wanted)


def test_hooks_of_the_models_head_fire_and_its_forward_comes_back() -> None:
    model = tiny_llama()
    hidden, targets = states(model)
    head = LogprobHead(model)
    seen: list[Any] = []
    before = model.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given))
    after = model.lm_head.register_forward_hook(lambda module, given, result: seen.append(result))
    found = everything(head, hidden, targets)
    before.remove()
    after.remove()
    assert len(seen) == 2
    assert len(seen[0]) == 1
    assert seen[0][0] is hidden
    assert seen[1] is found
    assert "forward" not in model.lm_head.__dict__
    assert model.lm_head(hidden).shape == (6, 64)


def test_a_hook_that_changes_the_hidden_states_counts() -> None:
    model = tiny_llama()
    hidden, targets = states(model)
    plain = LogprobHead(model)(2 * hidden, targets[:6]).logprobs
    with model.lm_head.register_forward_pre_hook(lambda module, given: (2 * given[0],)):
        hooked = LogprobHead(model)(hidden, targets[:6]).logprobs
    assert hooked.equal(plain)


def test_the_forward_comes_back_after_a_mistake() -> None:
    model = tiny_llama()
    hidden, targets = states(model)
    with pytest.raises(ValueError, match="targets must lie"):
        LogprobHead(model)(hidden, targets[:6] + 64)
    assert "forward" not in model.lm_head.__dict__


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A device mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")
def test_a_sharded_head_gathers_its_weight_for_the_fused_forward(one_process: Any) -> None:
    """FSDP2 keeps the weight as a DTensor and gathers it in hooks around the head's forward and backward."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    sharded = copy.deepcopy(model)
    fully_shard(sharded.lm_head, mesh=one_process)
    results = []
    for m in (model, sharded):
        head = LogprobHead(m)
        assert head.fused
        hidden, targets = states(m)
        found = everything(head, hidden, targets)
        loss(found).backward()
        weight = m.lm_head.weight.grad
        full = weight if m is model else weight.full_tensor()
        results.append([found.logprobs.detach(), hidden.grad, full])
    assert type(sharded.lm_head.weight).__name__ == "DTensor"
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_an_adapter_on_the_head_takes_the_models_own_way() -> None:
    model = tiny_llama()
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config).base_model.model
    head = LogprobHead(adapted)
    assert not head.fused
    hidden, targets = states(model)
    found = head(hidden, targets[:6], temperature=0.7).logprobs
    wanted = torch.log_softmax(adapted.lm_head(hidden) / 0.7, -1).gather(-1, targets[:6, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_" in n)


class Scaled(nn.Linear):
    """A head with a forward of its own, as quantized layers have."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("replaced", ["class", "instance"])
def test_a_head_with_a_forward_of_its_own_is_not_fused(replaced: str) -> None:
    model = tiny_llama()
    forward = model.lm_head.forward
    if replaced == "class":
        model.lm_head.__class__ = Scaled
    else:  # as accelerate does to offload weights
        model.lm_head.forward = lambda x: 2 * forward(x)
    head = LogprobHead(model)
    assert not head.fused
    hidden, targets = states(model)
    wanted = torch.log_softmax(model.lm_head(hidden), -1).gather(-1, targets[:6, None])[:, 0]
    torch.testing.assert_close(head(hidden, targets[:6]).logprobs, wanted)
