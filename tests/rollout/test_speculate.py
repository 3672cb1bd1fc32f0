"""Drafts change how many steps a response takes and nothing else: the same samples, the exact law, on every model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from rollout.stand_in import StandIn, count_calls, small_tokenizer
from tiny_models import TINY, tiny_llama
from tokenloom.batch import Rollouts, Sampling
from tokenloom.rollout import decode, generate
from tokenloom.rollout.draft import GroupDrafts


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (n,), generator=generator) for n in lengths]


def responses(rollouts: Rollouts) -> list[list[int]]:
    return [rollouts.response(i).tolist() for i in range(len(rollouts))]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_samples_are_the_same(name: str, temperature: float) -> None:
    # Windows are 4 tokens; rows end at different steps; the last rows of a batch draft again and again.
    model = TINY[name]().double()
    policy = StandIn(model, ends=range(1, 64, 13))
    sampling = Sampling(max_tokens=30, seed=3, temperature=temperature)
    calls = count_calls(model)
    plain = generate(policy, prompts(5, 1, 30), sampling, copies=2)
    steps = len(calls)
    drafted = generate(policy, prompts(5, 1, 30), sampling, copies=2, speculate=4)
    assert responses(drafted) == responses(plain)
    assert torch.allclose(drafted.sampler_logprobs, plain.sampler_logprobs, atol=1e-5)
    assert torch.equal(drafted.truncated, plain.truncated)
    assert len(calls) - steps <= steps
    if temperature == 0 and int(plain.lengths.max()) == 30:
        assert len(calls) - steps < steps, "greedy texts of random models repeat themselves"


def test_every_sequence_has_exactly_its_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are step functions of (u_0, u_1, u_2): with drafts too, the steps are at the law's cumulative sums."""
    model = tiny_llama(vocab=4).double()
    policy, prompt = StandIn(model, ends=()), torch.tensor([3, 0, 3, 0, 3, 0])  # it drafts 3 0 3
    cells, sequences, mass = [], list(itertools.product(range(4), repeat=3)), 0.0
    for sequence in sequences:
        with torch.no_grad():
            law = model(torch.cat([prompt, torch.tensor(sequence)])[None]).logits[0, 5:8].softmax(-1)
        below = [float(law[t, :token].sum()) for t, token in enumerate(sequence)]
        widths = [float(law[t, token]) for t, token in enumerate(sequence)]
        mass += widths[0] * widths[1] * widths[2]
        # Just inside both ends of the cell.
        cells.append([[b + x * w for b, w in zip(below, widths, strict=True)] for x in (1e-6, 1 - 1e-6)])
    assert mass == pytest.approx(1.0, abs=1e-12)
    for end in range(2):
        table = torch.tensor([cell[end] for cell in cells], dtype=torch.float64)
        monkeypatch.setattr(decode, "uniform_streams", lambda keys, steps, device, table=table: table)
        monkeypatch.setattr(decode, "_FREE_TOKENS", {"cpu": 10**6})
        calls = count_calls(model)
        out = generate(policy, [prompt], Sampling(max_tokens=3, seed=0), copies=len(sequences), speculate=2)
        assert out.tokens.tolist() == [list(s) for s in sequences]
        assert any(width > 1 for _, width in calls[1:]), "nothing was drafted"


def test_forward_calls_fall_on_text_that_repeats() -> None:
    model = tiny_llama()
    cycle = [10, 20, 30, 40, 50]

    def follow(logits: Tensor, step: int) -> Tensor:
        logits.fill_(-torch.inf)
        logits[:, cycle[step % 5]] = 0.0
        return logits

    policy, calls = StandIn(model, ends=()), count_calls(model)
    sampling = Sampling(max_tokens=60, seed=0)
    out = generate(policy, prompts(3), sampling, copies=2, speculate=6, shape_logits=follow)
    assert responses(out) == [cycle * 12] * 2
    # Seven tokens a step once the cycle has been seen (five tokens and an n-gram of two) and the drafts have grown.
    assert len(calls) <= 8 + 6 + -(-53 // 7)


def test_wide_batches_and_unpredictable_text_are_left_alone() -> None:
    model = tiny_llama()
    calls = count_calls(model)
    generate(StandIn(model, ends=()), prompts(3), Sampling(max_tokens=20, seed=0), copies=12, speculate=4)
    assert {width for _, width in calls[1:]} == {1}


def test_stop_strings_limits_and_events_with_drafts() -> None:
    tokenizer = small_tokenizer()
    policy = StandIn(tiny_llama(vocab=300), tokenizer)
    sampling = Sampling(max_tokens=40, seed=0, temperature=0.3, stop=("1", "th"))
    plain = generate(policy, prompts(3, 5), sampling, copies=3)
    told: dict[int, list[int]] = {}
    steps: list[int] = []

    def listen(row: int, ids: list[int]) -> None:
        told.setdefault(row, []).extend(ids)
        steps.append(len(ids))

    drafted = generate(policy, prompts(3, 5), sampling, copies=3, speculate=5, on_tokens=listen)
    assert responses(drafted) == responses(plain)
    assert told == dict(enumerate(responses(plain)))
    assert max(steps) > 1


def lfm() -> Any:
    """Convolutions and attention: a state that forgets nothing."""
    config = Lfm2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], conv_L_cache=3, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Lfm2ForCausalLM(config).eval()


def test_models_with_other_states_decode_without_drafts() -> None:
    policy, given = StandIn(lfm(), ends=()), prompts(5, 5)
    ours = generate(policy, given, Sampling(temperature=0, max_tokens=10), copies=1)
    theirs = policy.model.generate(
        input_ids=torch.stack(given), do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0
    )
    assert ours.tokens.tolist() == theirs[:, 5:].tolist()
    with pytest.raises(ValueError, match="set speculate to 0"):
        generate(policy, given, Sampling(max_tokens=4), copies=1, speculate=2)
    with pytest.raises(ValueError, match="speculate is -1"):
        generate(policy, given, Sampling(max_tokens=4), copies=1, speculate=-1)


def test_drafts_come_from_the_prompt_then_from_the_group() -> None:
    drafts = GroupDrafts([(1, 2, 3, 4, 9, 1, 2), (1, 2, 3, 4, 9, 1, 2), (5, 1, 2)], 3)
    assert drafts.propose(0, 10) == [3, 4, 9]
    assert drafts.propose(0, 2) == [3, 4]
    assert drafts.propose(2, 10) == [], "another prompt's text is another group's"
    drafts.learn([(1, [7, 8])])
    # The latest `1 2` is what row 1 has just written.
    assert drafts.propose(0, 10) == [7, 8]


def test_drafts_grow_when_they_come_true_and_pause_when_they_do_not() -> None:
    drafts = GroupDrafts([(1, 2, 3, 4, 5, 6, 1, 2)], 4)
    assert drafts.propose(0, 9) == [3, 4, 5, 6]
    drafts.learn([(0, [3, 4, 9])])  # two of four came true, so three are next
    drafts.learn([(0, [1, 2])])
    assert drafts.propose(0, 9) == [3, 4, 9]
    drafts.learn([(0, [3, 4, 9, 1])])  # all
    drafts.learn([(0, [2])])
    assert drafts.propose(0, 9) == [3, 4, 9, 1]
    for misses in (1, 2):
        drafts.learn([(0, [20 + misses, 1, 2])])  # none
        for _ in range(2**misses):
            assert drafts.propose(0, 9) == []
        assert len(drafts.propose(0, 9)) == 1
