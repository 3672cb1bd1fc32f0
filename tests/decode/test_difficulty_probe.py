"""Difficulty on a model: values learned from trajectories, one forward at test time, samples by difficulty."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.difficulty_probe import difficulty, fit_states, fit_value
from tokenloom.decode.hidden_states import states
from tokenloom.decode.probe import Probe

# The chain of tests/methods/decoding/test_difficulty_probe.py in rollouts: 20 of each kind, in exact shares.
CHAIN = [((0, 1, 2), 1.0, 7), ((0, 1, 2), 0.0, 28), ((0, 1, 3), 1.0, 35), ((0, 2), 1.0, 6), ((0, 2), 0.0, 24)]


@pytest.mark.parametrize("monte_carlo", [False, True])
def test_tables_learn_the_success_probability(monte_carlo: bool) -> None:
    paths = [path for path, _, count in CHAIN for _ in range(count)]
    rewards = [reward for _, reward, count in CHAIN for _ in range(count)]
    probe = fit_states(
        [torch.eye(4)[list(p)] for p in paths],
        rewards,
        hidden=(),
        monte_carlo=monte_carlo,
        epochs=400,
        batch=100,
        learning_rate=0.05,
    )
    found = probe(torch.eye(4)).tolist()
    assert found == pytest.approx([0.48, 0.6, 0.2, 1.0], abs=0.02)


def test_the_value_of_prompts_is_learned_and_nothing_is_generated() -> None:
    model = tiny_llama()
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (int(n),), generator=g).tolist() for n in torch.randint(2, 6, (24,), generator=g)]
    solved = [float(p[-1] % 2) for p in prompts]
    completions = [[t, 1] for t in torch.randint(3, 64, (24,), generator=g).tolist()]
    calls: list[int] = []
    probe = fit_value(
        model, prompts, completions, solved, hidden=(32,), monte_carlo=True, epochs=150, learning_rate=1e-2
    )
    handle = model.model.register_forward_pre_hook(lambda module, given: calls.append(1))
    hard = difficulty(probe, model, prompts, batch=24)
    handle.remove()
    assert calls == [1]
    assert ((hard < 0.5).float() == torch.tensor(solved)).float().mean() > 0.9


def test_harder_prompts_get_more_samples(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=len(tokenizer))
    given = tokenizer(["12", "the answer is"], return_tensors="pt", padding=True, padding_side="left")
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(given.input_ids, given.attention_mask, strict=True)]
    probe = Probe.fit(states(model, prompts), torch.tensor([0.9, 0.1]), l2=1e-3)
    probe.save(tmp_path / "probe.safetensors")
    loop = decode.loop(
        "difficulty-probe", probe=str(tmp_path / "probe.safetensors"), tokenizer=tokenizer, n_min=1, n_max=11
    )
    model.generate(
        given.input_ids, attention_mask=given.attention_mask, do_sample=True, max_new_tokens=3, custom_generate=loop
    )
    assert loop.last_run is not None
    expected = [1 + math.ceil(10 * float(h)) for h in difficulty(probe, model, prompts)]
    assert loop.copies(loop.last_run) == expected
    assert expected[0] < 4
    assert expected[1] > 8
    assert loop.last_run.counts["samples"] == sum(expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"reward in \[0, 1\]"):
        fit_states([torch.zeros(2, 3)], [2.0])
    with pytest.raises(ValueError, match="n_min <= n_max"):
        decode.loop("difficulty-probe", probe=Probe(4), tokenizer=byte_level(), n_min=5, n_max=2)
