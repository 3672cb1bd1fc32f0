"""Group, attention and chained chunk signals on real (tiny) models, against the padded eager forward's own outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from full_logits import ragged_rollouts
from tiny_models import TINY, tiny_llama
from tokenloom.batch import Rollouts
from tokenloom.catalog import parts
from tokenloom.policy import ModelConfig, Policy
from tokenloom.signals import (
    ATTENTION_SIGNALS,
    CHUNK_SIGNALS,
    GROUP_SIGNALS,
    attention_signal,
    chunk_signal,
    group_signal,
)

EPS = torch.finfo(torch.float32).eps
# Two layers of four projections and two sums over at most 32 keys, each of at most 32 products.
TOLERANCE = 2 * (4 * 32 + 2 * 32) * EPS


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    parts()  # the methods' own signals must be there before and after
    tables: list[dict[str, Any]] = [CHUNK_SIGNALS, GROUP_SIGNALS, ATTENTION_SIGNALS]
    before = [dict(t) for t in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def states_and_attention(model: Any, rollouts: Rollouts, row: int) -> tuple[Tensor, list[Tensor], int]:
    """Last hidden states [S, D] and attention [H, S, S] by layer of one row, from the model's own eager forward."""
    ids = torch.cat([rollouts.prompt_tokens[row], rollouts.response(row)])[None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.base_model(ids, output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return out.last_hidden_state[0], [a[0] for a in out.attentions], len(rollouts.prompt_tokens[row])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY)
def test_attention_is_the_eager_forwards_own(name: str, attention: str) -> None:
    @attention_signal("seen", "attention", "attention_entropies", "prompt_length", "mask")
    def seen(attention: Tensor, entropies: Tensor, prompt_length: int, mask: Tensor) -> Tensor:
        at = torch.arange(len(mask)) + prompt_length - 1
        return torch.stack([attention[at, 0], entropies[at]], -1)

    @attention_signal("upper", "attention", "prompt_length", "mask", band=(0.5, 1.0))
    def upper(attention: Tensor, prompt_length: int, mask: Tensor) -> Tensor:
        return attention[torch.arange(len(mask)) + prompt_length - 1, 0]

    model = TINY[name](attention=attention)
    policy = Policy(model, config=ModelConfig(token_budget=24))
    implementation = model.config._attn_implementation
    rollouts = ragged_rollouts()
    signals = policy.signals(rollouts, ["seen", "upper"])
    assert model.config._attn_implementation == implementation
    assert not signals.extras["seen"].requires_grad
    assert bool((signals.extras["seen"][~rollouts.mask] == 0).all())
    for row in range(len(rollouts)):
        if not bool(rollouts.mask[row].any()):
            continue
        _, layers, prompt = states_and_attention(model, rollouts, row)
        entropies = torch.stack([torch.special.entr(a).sum(-1).mean(0) for a in layers]).mean(0)
        for t in rollouts.mask[row].nonzero()[:, 0].tolist():
            at = prompt + t - 1
            first = torch.stack([a.mean(0)[at, 0] for a in layers])
            found = signals.extras["seen"][row, t]
            torch.testing.assert_close(found[0], first.mean(), rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(found[1], entropies[at], rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(signals.extras["upper"][row, t], first[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_an_attention_signal_must_speak_of_every_token() -> None:
    @attention_signal("short", "attention")
    def short(attention: Tensor) -> Tensor:
        return attention[:1, 0]

    with pytest.raises(ValueError, match="'short' returned shape"):
        Policy(tiny_llama()).signals(ragged_rollouts(), ["short"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_group_signal_sees_its_group(name: str) -> None:
    @group_signal("agreement", "hidden", "logits", "tokens", "mask", "outcomes")
    def agreement(
        hidden: Tensor, logits: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor, outcomes: Tensor
    ) -> Tensor:
        law = torch.log_softmax(logits(hidden[mask]), -1)
        out = torch.zeros(mask.shape)
        out[mask] = law.gather(-1, tokens[mask][:, None])[:, 0] + outcomes.sum()
        return out

    model = TINY[name]()
    policy = Policy(model, config=ModelConfig(token_budget=24))
    rollouts = ragged_rollouts()
    rollouts = rollouts.replace(rewards=torch.arange(1.0, len(rollouts) + 1))
    signals = policy.signals(rollouts, ["agreement", "logprobs"])
    assert rollouts.rewards is not None
    assert signals.logprobs is not None
    sums = torch.stack([rollouts.rewards[rollouts.group_ids == g].sum() for g in rollouts.group_ids])
    wanted = torch.where(rollouts.mask, signals.logprobs + sums[:, None], torch.zeros(()))
    # Log-probs of size up to 20 and sums of rewards up to 30 round apart.
    torch.testing.assert_close(signals.extras["agreement"], wanted, rtol=TOLERANCE, atol=50 * TOLERANCE)
    with pytest.raises(ValueError, match="score them first"):
        policy.signals(rollouts.replace(rewards=None), ["agreement"])


def test_a_signal_may_read_one_taken_earlier() -> None:
    @chunk_signal("old_best", "logits")
    def old_best(logits: Tensor) -> Tensor:
        return logits.topk(2).indices.to(logits.dtype)

    @chunk_signal("best_now", "logits", "old_best")
    def best_now(logits: Tensor, old_best: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(-1, old_best.long())

    model = tiny_llama()
    policy = Policy(model, config=ModelConfig(chunk_rows=3))
    rollouts = ragged_rollouts()
    old = policy.signals(rollouts, ["old_best"]).extras
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    now = policy.signals(rollouts, ["best_now"], grad=True, given=old).extras["best_now"]
    assert now.requires_grad
    for row, t in rollouts.mask.nonzero().tolist():
        ids = torch.cat([rollouts.prompt_tokens[row], rollouts.response(row)])[None]
        at = len(rollouts.prompt_tokens[row]) + t - 1
        law = torch.log_softmax(model(ids).logits[0, at] / rollouts.sampling.temperature, -1)
        wanted = law[old["old_best"][row, t].long()]
        torch.testing.assert_close(now[row, t], wanted, rtol=TOLERANCE, atol=20 * TOLERANCE)
    # Without `given` the signal is taken anew, so the best tokens of today come first.
    fresh = policy.signals(rollouts, ["best_now"]).extras["best_now"]
    assert bool((fresh[..., 0] >= fresh[..., 1])[rollouts.mask].all())


def test_an_input_must_exist() -> None:
    with pytest.raises(ValueError, match="takes 'logit'"):
        chunk_signal("wrong", "logit")


def test_signals_keep_their_width_without_any_token() -> None:
    @chunk_signal("pair", "logits")
    def pair(logits: Tensor) -> Tensor:
        return logits[:, :2]

    @attention_signal("triple", "attention_entropies", "prompt_length", "mask")
    def triple(entropies: Tensor, prompt_length: int, mask: Tensor) -> Tensor:
        return entropies[torch.arange(len(mask)) + prompt_length - 1, None].expand(-1, 3)

    rollouts = ragged_rollouts()
    silent = rollouts.replace(mask=torch.zeros_like(rollouts.mask))
    found = Policy(tiny_llama()).signals(silent, ["pair", "triple"]).extras
    assert found["pair"].shape == (*silent.mask.shape, 2)
    assert found["triple"].shape == (*silent.mask.shape, 3)
