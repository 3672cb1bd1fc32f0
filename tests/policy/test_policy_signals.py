"""Signals and gradients of ten architectures against whole logits; ragged and dead rows; what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from full_logits import full_logits_signals, ragged_rollouts
from tiny_models import TINY, tiny_llama, tiny_phi
from tokenloom.batch import Rollouts
from tokenloom.policy import ModelConfig, Policy
from tokenloom.signals import Signals

# Roundings on the longest path of a tiny model: two layers of four projections and attention (sums of
# 16 to 32 products each) and the head. A gradient runs the path twice.
ROUNDINGS = 2 * (4 * 16 + 2 * 32 + 16) + 16 + 64


def small(**settings: Any) -> ModelConfig:
    """Chunks and calls so small that every seam is crossed."""
    return ModelConfig(**{"chunk_rows": 3, "token_budget": 24, **settings})


def loss_of(signals: dict[str, Tensor]) -> Tensor:
    """A sum with a different weight for every entry."""
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(signals.values()):
        weights = torch.linspace(-1.0 - i, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)
        total = total + (weights * x).sum().double()
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def compare(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_signals_and_gradients_are_those_of_the_whole_logits(name: str, dtype: torch.dtype, attention: str) -> None:
    model = TINY[name](attention=attention).to(dtype)
    policy = Policy(model, config=small())
    assert policy.head.fused
    rollouts = ragged_rollouts()
    wanted = full_logits_signals(model, rollouts)
    wanted.pop("values")
    loss_of(wanted).backward()
    wanted_grads = gradients(model)
    signals = policy.signals(rollouts, ["logprobs", "entropies"], grad=True)
    assert signals.logprobs is not None
    assert signals.logprobs.dtype == dtype
    policy.backward(loss_of(signals.named()))
    grads = gradients(model)
    # Models compute norms, rotations and softmaxes in float32 whatever their own format.
    eps = torch.finfo(torch.float32).eps
    tolerance = ROUNDINGS * eps if dtype == torch.float32 else 16 * eps
    for key, value in signals.named().items():
        compare(value, wanted[key], tolerance)
    assert grads.keys() == wanted_grads.keys()
    for key, grad in grads.items():
        compare(grad, wanted_grads[key], 2 * tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_float64_is_tight(name: str) -> None:
    """With sdpa these compute their attention in float64; what is left in float32 is equal for each token."""
    model = TINY[name]().double()
    rollouts = ragged_rollouts()
    signals = Policy(model, config=small()).signals(rollouts, ["logprobs", "entropies"])
    wanted = full_logits_signals(model, rollouts)
    for key, value in signals.named().items():
        compare(value, wanted[key], 1e-9)


def test_off_the_mask_everything_is_zero() -> None:
    rollouts = ragged_rollouts()
    policy = Policy(tiny_llama(), config=small(value_head={}))
    needs = ["logprobs", "old_logprobs", "ref_logprobs", "entropies", "values", "old_values"]
    signals = policy.signals(rollouts, needs, grad=True)
    assert set(signals.named()) == set(needs)
    for name, x in signals.named().items():
        assert x.shape == rollouts.tokens.shape
        assert x[~rollouts.mask].eq(0).all(), name
    assert signals.logprobs is not None
    assert signals.logprobs[rollouts.mask].lt(0).all()
    for name in ("old_logprobs", "ref_logprobs"):
        x = signals.named()[name]
        assert not x.requires_grad
        # The reference goes through another copy of the same weights in calls of the same shapes.
        torch.testing.assert_close(x, signals.logprobs.detach(), rtol=0, atol=0)


def count_calls(policy: Policy) -> list[tuple[int, int]]:
    """Shapes of the token batches that reach the trunk from now on."""
    shapes: list[tuple[int, int]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    policy.trunk.register_forward_pre_hook(hook, with_kwargs=True)
    return shapes


def test_dead_rows_never_reach_the_model_and_no_call_exceeds_the_budget() -> None:
    rollouts = ragged_rollouts()
    policy = Policy(tiny_llama(), config=small())
    shapes = count_calls(policy)
    policy.signals(rollouts, ["logprobs"])
    # Rows 2 and 4 are dead. A row ends with the state that predicts its last sampled token: 17, 9, 4 tokens, of
    # which 17 and 4 fit into a call of 24 side by side.
    assert shapes == [(1, 21), (1, 9)]


def test_only_what_is_needed_is_computed() -> None:
    rollouts = ragged_rollouts()
    policy = Policy(tiny_llama(), config=small(token_budget=1000))
    policy.prepare(["ref_logprobs"])
    shapes = count_calls(policy)
    assert policy.signals(rollouts, []).named() == {}
    assert shapes == []
    assert set(policy.signals(rollouts, ["ref_logprobs"]).named()) == {"ref_logprobs"}
    assert shapes == []  # the policy itself was not run
    assert set(policy.signals(rollouts, ["entropies", "logprobs"]).named()) == {"entropies", "logprobs"}
    assert len(shapes) == 1


def test_the_reference_is_copied_only_when_needed() -> None:
    policy = Policy(tiny_llama(), config=small())
    policy.signals(ragged_rollouts(), ["logprobs", "old_logprobs", "entropies"])
    assert policy.reference._copy is None
    policy.prepare(["ref_logprobs"])
    assert policy.reference._copy is not None


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_of_dead_rows(grad: bool) -> None:
    rollouts = ragged_rollouts().rows([2, 4])
    policy = Policy(tiny_llama(), config=small(value_head={}))
    signals = policy.signals(rollouts, ["logprobs", "entropies", "ref_logprobs", "values"], grad=grad)
    for x in signals.named().values():
        assert x.eq(0).all()
    if grad:
        assert signals.logprobs is not None
        policy.backward(signals.logprobs.sum())
        assert all(p.grad is None for _, p in policy.trainable_parameters())


def test_greedy_rollouts_are_scored_at_temperature_one() -> None:
    policy = Policy(tiny_llama(), config=small())
    greedy = policy.signals(ragged_rollouts(temperature=0.0), ["logprobs"])
    plain = policy.signals(ragged_rollouts(temperature=1.0), ["logprobs"])
    assert greedy.logprobs is not None
    assert plain.logprobs is not None
    assert torch.equal(greedy.logprobs, plain.logprobs)


def test_an_empty_prompt_is_refused() -> None:
    rollouts = Rollouts.build([[], [3]], [[4, 5], [6]], [0, 0])
    with pytest.raises(ValueError, match="row 0 has an empty prompt"):
        Policy(tiny_llama(), config=small()).signals(rollouts, ["logprobs"])
    # Without a sampled first token there is nothing to refuse.
    later = rollouts.replace(mask=torch.tensor([[False, True], [True, False]]))
    assert Policy(tiny_llama(), config=small()).signals(later, ["logprobs"]).logprobs is not None


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (["logprob"], "unknown signal 'logprob'; known: logprobs, old_logprobs.*did you mean 'logprobs'"),
        (["values"], "no critic"),
        ("logprobs", r"write \['logprobs'\]"),
    ],
)
def test_unknown_needs(needs: Any, message: str) -> None:
    policy = Policy(tiny_llama(), config=small())
    for call in (policy.signals, lambda _, n: policy.prepare(n)):
        with pytest.raises(ValueError, match=message):
            call(ragged_rollouts(), needs)


def test_a_loss_without_gradient_is_refused() -> None:
    policy = Policy(tiny_llama(), config=small())
    signals = policy.signals(ragged_rollouts(), ["logprobs"])
    assert signals.logprobs is not None
    with pytest.raises(ValueError, match="grad=True"):
        policy.backward(signals.logprobs.sum())


def test_dropout_is_off_even_in_training_mode() -> None:
    model = tiny_phi()
    assert model.config.resid_pdrop == 0.3
    policy = Policy(model, config=small())
    rollouts = ragged_rollouts()
    before = policy.signals(rollouts, ["logprobs"]).logprobs
    model.train()
    after = policy.signals(rollouts, ["logprobs"], grad=True).logprobs
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def signals_and_gradients(config: ModelConfig) -> tuple[Signals, dict[str, Tensor], int]:
    policy = Policy(tiny_llama(), config=config)
    calls = []
    policy.causal.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    signals = policy.signals(ragged_rollouts(), ["logprobs", "entropies"], grad=True)
    policy.backward(loss_of(signals.named()))
    return signals, gradients(policy.model), len(calls)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    plain, plain_grads, plain_calls = signals_and_gradients(small())
    again, again_grads, again_calls = signals_and_gradients(small(gradient_checkpointing=True))
    assert again_calls == 2 * plain_calls
    for name, x in plain.named().items():
        assert torch.equal(x, again.named()[name])
    for name, x in plain_grads.items():
        torch.testing.assert_close(x, again_grads[name], rtol=0, atol=0)


def test_gradient_checkpointing_leaves_the_cache_alone_between_passes() -> None:
    policy = Policy(tiny_llama(), config=small(gradient_checkpointing=True))
    policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
    assert not any(m.training for m in policy.causal.modules())
    output = policy.model(torch.tensor([[3, 4, 5]]), use_cache=True)
    assert output.past_key_values.get_seq_length() == 3


def test_bf16_autocast_is_near_float32() -> None:
    rollouts = ragged_rollouts(temperature=1.0)
    exact = Policy(tiny_llama(), config=small()).signals(rollouts, ["logprobs"]).logprobs
    policy = Policy(tiny_llama(), config=small(autocast="bf16"))
    rough = policy.signals(rollouts, ["logprobs"], grad=True).logprobs
    assert exact is not None
    assert rough is not None
    assert rough.dtype == torch.float32
    policy.backward(rough.sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in policy.trainable_parameters())
    errors = (rough - exact)[rollouts.mask].abs()
    # About twenty roundings of half an eps on the way to logits of size 5, adding up as a root.
    assert 0 < float(errors.detach().mean()) < 5 * 20**0.5 * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casts_are_not_kept_for_layers_that_are_recomputed(checkpointing: bool) -> None:
    policy = Policy(tiny_llama(), config=small(autocast="bf16", gradient_checkpointing=checkpointing))
    kept: list[tuple[bool, bool]] = []
    policy.causal.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: kept.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    policy.signals(ragged_rollouts(), ["logprobs"])
    assert set(kept) == {(True, True)}
    kept.clear()
    policy.backward(policy.signals(ragged_rollouts(), ["logprobs"], grad=True).named()["logprobs"].sum())
    # In the forward and, where there is one, in its repetition.
    assert set(kept) == {(True, not checkpointing)}


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("fused", [True, False])
def test_logits_never_exist_for_the_batch(fused: bool) -> None:
    vocab, rows, length = 16384, 8, 30
    policy = Policy(tiny_llama(vocab=vocab), config=small(chunk_rows=8, token_budget=2000, share_prefixes=False))
    policy.head.fused = fused
    responses = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    rollouts = Rollouts.build([[3]] * rows, list(responses), [0] * rows)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with LargestTensor() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            signals = policy.signals(rollouts, ["logprobs", "entropies"], grad=True)
        policy.backward(loss_of(signals.named()))
    # Nor do all chunks' logits wait together for the backward.
    assert kept
    assert not [x.shape for x in kept if x.shape[-1:] == (vocab,) and x.numel() == 8 * vocab]
    assert seen.largest < rows * length * vocab / 8
    # The embedding matrix, and hidden states of the widest layer, are the largest things there are.
    assert seen.largest <= max(vocab * 16, rows * length * 32, 8 * vocab)


def test_hidden_states_of_one_call_serve_all_signals() -> None:
    policy = Policy(tiny_llama(), config=small(token_budget=1000, value_head={}))
    shapes = count_calls(policy)
    policy.signals(ragged_rollouts(), ["logprobs", "old_logprobs", "entropies", "values", "old_values"], grad=True)
    assert len(shapes) == 1
