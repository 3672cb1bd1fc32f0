"""Gradients added to `.grad` directly: the same sums as autograd's, and only where nobody would miss them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from full_logits import ragged_rollouts
from tiny_models import tiny_llama
from tokenloom.kernels import linear_logprobs
from tokenloom.kernels.accumulation import accumulating, accumulator
from tokenloom.policy import ModelConfig, Policy, lean_training
from tokenloom.policy.lean_training import _Embedding


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 8, generator=draw, dtype=torch.float64).to(dtype))
    hidden = torch.randn(5, 8, generator=draw, dtype=torch.float64).to(dtype)
    return weight, hidden, torch.tensor([3, 299, 0, 3, 17])


def total(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    return (linear_logprobs(hidden, None, targets, weight).logprobs * torch.arange(1, 6)).sum()


@pytest.mark.parametrize("cast", [False, True], ids=["wide", "bf16"])
def test_what_is_added_is_what_autograd_adds(cast: bool) -> None:
    """Over two backward passes, the first without a `.grad` to add to."""
    grads = []
    for directly in (False, True):
        weight, hidden, targets = problem(torch.float32 if cast else torch.float64)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = total(weight, hidden, targets)
            with accumulating() if directly else nullcontext():
                loss.backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    # The same products, added in another order.
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5 if cast else 1e-12, atol=1e-6 if cast else 1e-14)


def test_autograd_is_handed_nothing() -> None:
    """Of the weight's gradient, within the context and in the thread that opened it; others get theirs."""
    weight, hidden, targets = problem()
    with accumulating():
        found = torch.autograd.grad(total(weight, hidden, targets), weight, allow_unused=True)
        assert found == (None,)
        assert weight.grad is not None
        held, weight.grad = weight.grad, None
        with ThreadPoolExecutor(1) as other:
            (elsewhere,) = other.submit(
                lambda: torch.autograd.grad(total(weight, hidden, targets), weight)
            ).result()  # fmt: skip
    assert weight.grad is None
    torch.testing.assert_close(held, elsewhere)


def test_whoever_wants_to_see_a_gradient_is_given_it() -> None:
    """`torch.autograd.grad` outside of the context, hooks of both kinds within, and weights that are no parameters."""
    weight, hidden, targets = problem()
    (alone,) = torch.autograd.grad(total(weight, hidden, targets), weight)
    seen: list[Tensor] = []
    for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
        handle = register(lambda x: seen.append((x.grad if isinstance(x, nn.Parameter) else x).clone()))
        weight.grad = None
        with accumulating():
            assert accumulator(weight) is None
            total(weight, hidden, targets).backward()
        handle.remove()
        torch.testing.assert_close(seen.pop(), alone)
    doubled = 2 * weight
    with accumulating():
        assert accumulator(doubled) is None
        assert accumulator(weight.detach()) is None
        assert accumulator(nn.Parameter(torch.ones(2), requires_grad=False)) is None
        assert accumulator(weight) is weight.grad
    assert accumulator(weight) is None


@pytest.mark.parametrize("padding", [-1, 2])
def test_embeddings(padding: int) -> None:
    """Repeated ids add up, padding learns nothing."""
    ids = torch.tensor([[2, 5, 5], [0, 2, 63]])
    slopes = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    grads = []
    for directly in (False, True):
        weight = nn.Parameter(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
        found = _Embedding.apply(ids, weight, padding)
        assert torch.equal(found, weight[ids])
        with accumulating() if directly else nullcontext():
            found.backward(slopes)
        assert weight.grad is not None
        grads.append(weight.grad)
    expected = torch.zeros(64, 4)
    for i, slope in zip(ids.flatten().tolist(), slopes.flatten(0, 1), strict=True):
        expected[i] += 0.0 if i == padding else slope
    for grad in grads:
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}], ids=str)
def test_a_policy_with_tied_embeddings_learns_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, given = [], list[bool]()

    def noted(weight: Tensor) -> Tensor | None:
        found = accumulator(weight)
        given.append(found is not None)
        return found

    for module in (lean_training, sys.modules[linear_logprobs.__module__]):
        monkeypatch.setattr(module, "accumulator", noted)
    for directly in (False, True):
        policy = Policy(tiny_llama(tie_word_embeddings=True), config=ModelConfig(**settings))
        for _ in range(2):
            logprobs = policy.signals(ragged_rollouts(), ["logprobs"], grad=True).named()["logprobs"]
            loss = (logprobs * logprobs.detach()).sum()
            if directly:
                policy.backward(loss)
            else:
                loss.backward()
        frozen = "lora" in settings
        # Twice by the head and twice by the embedding, of weights that learn.
        assert given == ([] if frozen else [directly] * 4)
        given.clear()
        grads.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)
