"""Heads: what can be told from the states is found, quality against plain formulas, and files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_models import tiny_llama
from tokenloom.decode import rad, rmod
from tokenloom.decode.auxiliary import Headed
from tokenloom.decode.heads import Judged, auroc, fit_head, load_head, quality_beside, save_head
from tokenloom.decode.multi_token_heads import MultiTokenHeads
from tokenloom.decode.probe import Probe
from tokenloom.decode.rmod import ValueHeads
from tokenloom.policy import Policy

POLICY = Policy(tiny_llama(vocab=24))


def judged(count: int, seed: int) -> Judged:
    """Good responses are made of ids 3 and 4, others of 20 and 21."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 24, (3,), generator=g).tolist() for _ in range(count)]
    low = torch.randint(0, 2, (count,), generator=g).tolist()
    responses = [
        torch.randint(*((3, 5) if good else (20, 22)), (1 + i % 4,), generator=g).tolist() for i, good in enumerate(low)
    ]
    return Judged(prompts, responses, torch.tensor(low, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["reward", "value"])
def test_a_head_finds_what_states_tell(kind: str, tmp_path: Path) -> None:
    training, heldout = judged(200, 0), judged(80, 1)
    steps: list[int] = []
    head, quality = fit_head(kind, POLICY, training, heldout, progress=lambda d, *_: steps.append(d))  # type: ignore[arg-type]
    assert steps[-1] == len(steps)
    assert quality.auroc > 0.8
    assert quality.positive == pytest.approx(float(heldout.rewards.mean()))
    assert quality.mse < quality.constant_mse
    # The same numbers from the model's own forward.
    own, spread, ends = [], [], []
    read = head.head if isinstance(head, Headed) else head
    mean = sum(float(r) * len(x) for r, x in zip(training.rewards, training.responses, strict=True))
    mean /= sum(map(len, training.responses))
    for p, r, y in zip(heldout.prompts, heldout.responses, heldout.rewards, strict=True):
        with torch.no_grad():
            states = POLICY.model(torch.tensor([[*p, *r]]), output_hidden_states=True).hidden_states[-1][0]
            values = read(states)[len(p) :, 0]
        ends.append(values[-1])
        own += (values - y).square().tolist()
        spread += [(mean - float(y)) ** 2] * len(r)
    assert quality.mse == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert quality.constant_mse == pytest.approx(sum(spread) / len(spread), rel=1e-4)
    assert quality.auroc == pytest.approx(auroc(torch.stack(ends), heldout.rewards > 0.5), abs=1e-6)
    save_head(head, tmp_path / "h.safetensors", quality)
    assert quality_beside(tmp_path / "h.safetensors") == quality
    again = load_head(tmp_path / "h.safetensors", POLICY.model)
    assert type(again) is type(head)
    ids = torch.tensor([[3, 4, 5]])
    if isinstance(head, Headed):
        assert torch.equal(again(input_ids=ids).logits, head(input_ids=ids).logits)
    else:
        assert torch.equal(again(torch.ones(16)), head(torch.ones(16)))


def test_the_reward_fit_is_rads_on_the_model_itself() -> None:
    training = judged(24, 2)
    head, _ = fit_head("reward", POLICY, training, training, seed=3)
    wanted = rad.reward_model(tiny_llama(vocab=24))
    wanted.head.bias.data.fill_(float(training.rewards.mean()))
    texts = [[*p, *r] for p, r in zip(training.prompts, training.responses, strict=True)]
    rad.fit(wanted, texts, training.rewards, head_only=True, epochs=20, batch=32, learning_rate=1e-3, seed=3)
    assert torch.allclose(head.head.weight, wanted.head.weight, atol=1e-4)  # type: ignore[union-attr]
    assert torch.allclose(head.head.bias, wanted.head.bias, atol=1e-4)  # type: ignore[union-attr]


def test_the_value_fit_is_rmods_on_its_examples() -> None:
    training = judged(12, 4)
    head, _ = fit_head("value", POLICY, training, training)
    examples = rmod.examples(POLICY.model, training.prompts, training.responses, training.rewards[:, None])
    wanted = rmod.fit(*examples)
    assert torch.allclose(head.linear.weight, wanted.linear.weight, atol=1e-3)  # type: ignore[union-attr]


def test_auroc_by_hand() -> None:
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    # Pairs (3,1), (3,2), (2,1) are won, (2,2) is half: 3.5 of 4.
    assert auroc(scores, positive) == 0.875
    assert auroc(-scores, positive) == 0.125
    assert math.isnan(auroc(scores, torch.ones(4, dtype=torch.bool)))


def test_other_files_become_what_wrote_them(tmp_path: Path) -> None:
    Probe(16).save(tmp_path / "probe.safetensors")
    assert isinstance(load_head(tmp_path / "probe.safetensors", POLICY.model), Probe)
    ValueHeads(16, 3).save(tmp_path / "values.safetensors")
    assert load_head(tmp_path / "values.safetensors", POLICY.model).linear.weight.shape == (3, 16)
    MultiTokenHeads(16, 2).save(tmp_path / "tokens.safetensors")
    assert isinstance(load_head(tmp_path / "tokens.safetensors", POLICY.model), MultiTokenHeads)
    for name, tensor in (("vector", torch.ones(16)), ("directions", torch.ones(2, 16))):
        save_file({name: tensor}, tmp_path / "steering.safetensors")
        assert torch.equal(load_head(tmp_path / "steering.safetensors", POLICY.model), tensor)
    save_file({"something": torch.zeros(1)}, tmp_path / "else.safetensors")
    assert load_head(tmp_path / "else.safetensors", POLICY.model) == str(tmp_path / "else.safetensors")
    assert quality_beside(tmp_path / "else.safetensors") is None


def test_unfit_files_and_rewards_are_refused(tmp_path: Path) -> None:
    ValueHeads(8, 1).save(tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="hidden size 8, and this one's is 16"):
        load_head(tmp_path / "small.safetensors", POLICY.model)
    save_file({"vector": torch.ones(8)}, tmp_path / "vector.safetensors")
    with pytest.raises(ValueError, match="hidden size 8, and this one's is 16"):
        load_head(tmp_path / "vector.safetensors", POLICY.model)
    with pytest.raises(ValueError, match="there is no file"):
        load_head(tmp_path / "none.safetensors", POLICY.model)
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_head(tmp_path / "text.safetensors", POLICY.model)
    with pytest.raises(ValueError, match=r"rewards in \[0, 1\]"):
        Judged([[1]], [[2]], torch.tensor([2.0]))
    with pytest.raises(ValueError, match="numbers differ"):
        Judged([[1]], [], torch.tensor([1.0]))
    with pytest.raises(ValueError, match="reward or value"):
        fit_head("values", POLICY, judged(4, 0), judged(4, 1))  # type: ignore[arg-type]
