"""What all prompts begin with is computed once, long prefills go in parts, and neither shows in the responses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, GPTNeoConfig, MptConfig

from rollout.stand_in import StandIn, count_calls, full_logprobs
from tiny_models import TINY, build, tiny_llama
from tokenloom.batch import Sampling
from tokenloom.policy import Policy
from tokenloom.rollout import generate, masked_forward


def prompts(shared: int, *rest: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(3, 64, (shared,), generator=generator)
    return [torch.cat([begin, torch.randint(3, 64, (n,), generator=generator)]) for n in rest]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rest", [(5, 5, 5), (4, 1, 9)])
def test_shared_beginnings_change_nothing(name: str, rest: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows are 4 tokens, so that they reach across the padding between a beginning and the rest.
    model = TINY[name]().double()
    calls = count_calls(model)
    policy, given = StandIn(model, ends=range(1, 64, 11)), prompts(40, *rest)
    sampling = Sampling(max_tokens=12, seed=0)
    out = generate(policy, given, sampling, copies=3)
    assert calls[:2] == [(1, 40), (3, max(rest))]
    monkeypatch.setattr(masked_forward, "_LEAST_SHARED", 10**9)
    calls.clear()
    apart = generate(policy, given, sampling, copies=3)
    assert calls[0] == (3, 40 + max(rest))
    assert torch.equal(out.tokens, apart.tokens)
    assert torch.allclose(out.sampler_logprobs, apart.sampler_logprobs, atol=1e-6)
    for i in range(9):
        expected = full_logprobs(model, given[i // 3], out.response(i))
        # Hugging Face's norms compute in float32 even here.
        assert torch.allclose(out.sampler_logprobs[i, : len(expected)].double(), expected, atol=1e-5)


def test_a_prompt_that_begins_all_others_keeps_a_token_of_its_own() -> None:
    model = tiny_llama().double()
    calls = count_calls(model)
    longest = prompts(60, 6)[0]
    given = [longest[:50], longest, longest[:55]]
    out = generate(StandIn(model, ends=()), given, Sampling(max_tokens=4, seed=0), copies=2)
    assert calls[:2] == [(1, 49), (3, 17)]
    for i in range(6):
        expected = full_logprobs(model, given[i // 2], out.response(i))
        assert torch.allclose(out.sampler_logprobs[i].double(), expected, atol=1e-5)


def test_long_prefills_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().double()
    given = prompts(0, 20, 31, 17, 24, 30)
    whole = generate(StandIn(model), given, Sampling(max_tokens=8, seed=0), copies=2)
    calls = count_calls(model)
    monkeypatch.setattr(masked_forward, "_CHUNK", 70)
    parts = generate(StandIn(model), given, Sampling(max_tokens=8, seed=0), copies=2)
    assert calls[:3] == [(2, 31), (2, 31), (1, 31)]
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.allclose(whole.sampler_logprobs, parts.sampler_logprobs, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 12])
def test_bf16_with_few_and_many_rows(rows: int) -> None:
    """The cache is float32 for few rows and bfloat16 for many; the law is that of the same autocast forward."""
    policy = StandIn(tiny_llama(), ends=(), bf16=True)
    given = prompts(0, 6, 9)
    out = generate(policy, given, Sampling(max_tokens=6, seed=0), copies=[rows - 1, 1])
    for i in (0, rows - 1):
        with policy.autocast():
            expected = full_logprobs(policy.model, out.prompt_tokens[i], out.response(i)).float()
        # bfloat16 has 8 bits and logits up to 4 here.
        assert torch.allclose(out.sampler_logprobs[i], expected, atol=0.1)


def test_a_model_whose_window_counts_columns_keeps_to_those_in_use() -> None:
    """GPT-Neo's local layers: columns that a cache has in reserve would move its window."""
    layers = [[["global", "local"], 1]]
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, window_size=4, attention_types=layers
    )
    model, given = build(config), prompts(0, 6, 9)
    out = generate(StandIn(model, ends=()), given, Sampling(max_tokens=6, seed=0), copies=2)
    for i in range(4):
        expected = full_logprobs(model, given[i // 2], out.response(i))
        assert torch.allclose(out.sampler_logprobs[i], expected, atol=1e-5)
    with pytest.raises(ValueError, match="set speculate to 0"):
        generate(StandIn(model), given, Sampling(max_tokens=6, seed=0), copies=2, speculate=2)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_that_count_columns_are_left_to_the_other_forward(name: str) -> None:
    """ALiBi measures distances between columns (or takes no such mask), and shared beginnings leave gaps there."""
    bloom = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    mpt = MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, max_seq_len=128)
    policy, given = Policy(build(bloom if name == "bloom" else mpt)), prompts(40, 4, 1, 9)
    out = generate(policy, given, Sampling(max_tokens=6, seed=0), copies=2)
    for i in range(6):
        expected = full_logprobs(policy.model, given[i // 2], out.response(i))
        assert torch.allclose(out.sampler_logprobs[i, : len(expected)], expected, atol=1e-5)
