"""A student: its layers, its loss against plain autograd, what is measured against enumeration, and going on."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import TINY, tiny_llama
from tokenloom.decode import student as module
from tokenloom.decode.pair_quality import Quality, measure, round_tokens
from tokenloom.decode.student import Settings, distill, kept_layers, slim
from tokenloom.decode.student_samples import Sampled, collect, split
from tokenloom.policy import Policy
from tokenloom.policy.head import LogprobHead

PROMPTS = [[3, 4 + i, 5, 23 - i] for i in range(20)]
SMALL = Settings(layers=2, tokens=600, max_tokens=12, epochs=2, learning_rate=5e-3)


def teacher(layers: int = 4, **rest: Any) -> Policy:
    return Policy(tiny_llama(vocab=24, num_hidden_layers=layers, **rest))


def test_layers_are_evenly_spaced_with_both_ends() -> None:
    assert kept_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert kept_layers(3, 2) == [0, 2]
    assert kept_layers(3, 1) == [2]
    for count, layers in itertools.product(range(1, 40), range(2, 40)):
        if layers <= count:
            kept = kept_layers(count, layers)
            assert (kept[0], kept[-1], len(set(kept))) == (0, count - 1, layers)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="keeps 1 to 3"):
            kept_layers(3, wrong)


@pytest.mark.parametrize("name", sorted(TINY))
def test_all_layers_are_the_teacher_itself(name: str) -> None:
    whole = TINY[name]()
    same = slim(whole, [0, 1])
    ids = torch.tensor([[3, 9, 4, 7, 11, 5]])
    with torch.no_grad():
        assert torch.equal(same(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama"])
def test_a_kept_layer_is_what_skipping_the_others_leaves(name: str) -> None:
    whole, ids = TINY[name](seed=3), torch.tensor([[3, 9, 4, 7, 11, 5]])
    last = slim(whole, [1])
    skipped = TINY[name](seed=3)
    layers = next(m for m in skipped.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    layers[0].forward = lambda hidden, *_, **__: hidden  # type: ignore[assignment]
    with torch.no_grad():
        wanted = skipped(ids, use_cache=False).logits
        assert torch.allclose(last(ids, use_cache=False).logits, wanted, atol=1e-5)
        assert not torch.allclose(whole(ids).logits, wanted, atol=1e-2)


def test_only_layers_and_the_final_norm_train() -> None:
    for build in (tiny_llama, TINY["gpt2"], TINY["qwen2"]):
        small = slim(build(), [1])
        trained = set(module._trainable(small))
        names = {name for name, p in small.named_parameters() if p.requires_grad}
        assert trained
        assert all(
            ".layers." in n or ".h." in n or n.endswith(("norm.weight", "ln_f.weight", "ln_f.bias")) for n in names
        )
        assert any("norm" in n or "ln_f" in n for n in names - {n for n in names if ".layers." in n or ".h." in n})


def test_the_gradient_through_chunks_is_that_of_the_mean_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", 4 * 64)
    policy, small = teacher(), slim(teacher().model, [0, 3])
    g = torch.Generator().manual_seed(0)
    rows = [Sampled([3, 4], [5] * n, torch.randn(n, 16, generator=g)) for n in (3, 1, 5)]
    hidden = torch.randn(9, 16, generator=g, requires_grad=True)
    teach, learn = LogprobHead(policy.model), LogprobHead(small)
    loss, gradient = module._head_gradient(teach, learn, rows, hidden, policy)
    p = (torch.cat([r.states for r in rows]) @ policy.model.lm_head.weight.T).log_softmax(-1)
    q = (hidden @ small.lm_head.weight.T).log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    (grad,) = torch.autograd.grad(wanted, hidden)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.allclose(gradient, grad, atol=1e-6)


def test_tokens_of_a_round_are_those_of_enumeration() -> None:
    # Two laws without memory, p and q: a round of K drafts gives sum_{k=0..K} a^k tokens, a = sum min(p, q).
    p, q = (torch.tensor(law, dtype=torch.float64) for law in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    a = float(torch.minimum(p, q).sum())
    texts = list(itertools.product(range(3), repeat=4))
    weights = [math.prod(float(p[t]) for t in text) for text in texts]
    values = [round_tokens([(q / p).log()[list(text)]], 4) for text in texts]
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(
        sum(a**k for k in range(5)), abs=1e-9
    )
    assert math.isnan(round_tokens([torch.zeros(3)], 4))
    # Every place with enough behind it counts once: places 0 and 1 of five tokens.
    assert round_tokens([torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])], 4) == pytest.approx(1 + (4 * math.exp(-1) + 4) / 2)


def test_quality_against_whole_laws() -> None:
    policy = teacher(2)
    g = torch.Generator().manual_seed(1)
    rows, kls, sames, accepted = [], [], [], []
    small = tiny_llama(vocab=24, seed=9)
    for n in (5, 2, 7):
        prompt, response = torch.randint(3, 24, (2, n), generator=g).tolist()
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            out = policy.model(ids, output_hidden_states=True)
            p = out.logits[0, n - 1 : -1].double().softmax(-1)
            q = small(ids).logits[0, n - 1 : -1].double().softmax(-1)
            rows.append(Sampled(prompt, response, out.hidden_states[-1][0, n - 1 : -1]))
        kls += (p * (p / q).log()).sum(-1).tolist()
        sames += (p.argmax(-1) == q.argmax(-1)).double().tolist()
        accepted += torch.minimum(p, q).sum(-1).tolist()
    found = measure(policy, small, rows, batch=2)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert found.heldout_tokens == 14
    assert found.kl == pytest.approx(mean(kls), rel=1e-4)
    assert found.agreement == pytest.approx(mean(sames), abs=1e-6)
    assert found.acceptance == pytest.approx(mean(accepted), rel=1e-4)
    itself = measure(policy, policy.model, rows)
    assert (itself.kl, itself.acceptance) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert (itself.agreement, itself.round_tokens) == (1.0, pytest.approx(5, abs=1e-4))
    with pytest.raises(ValueError, match="there are none"):
        measure(policy, small, [])


def test_prompts_held_out_are_never_learned_from(tmp_path: Path) -> None:
    policy = teacher()
    learned, heldout = split([*PROMPTS, *PROMPTS], 0)
    assert (len(learned), len(heldout)) == (18, 2)
    assert sorted(learned + heldout) == sorted(PROMPTS)
    found = collect(policy, PROMPTS, tmp_path, SMALL, report=lambda *_: None)
    assert found.tokens >= SMALL.tokens
    assert {tuple(r.prompt) for r in found.heldout} == {tuple(p) for p in heldout}
    assert not {tuple(r.prompt) for r in found.training} & {tuple(p) for p in heldout}
    row = found.training[0]
    with torch.no_grad():
        states = policy.model(torch.tensor([[*row.prompt, *row.response]]), output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(row.states, states[0, row.begin : -1], atol=1e-5)
    assert len(row.response) <= SMALL.max_tokens
    with pytest.raises(ValueError, match="two different prompts"):
        split([[1, 2], [1, 2]], 0)


def test_a_student_learns_and_loads_as_an_ordinary_model(tmp_path: Path) -> None:
    policy, folder = teacher(), tmp_path / "student"
    stages: list[tuple[str, float | None]] = []
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    found = distill(policy, PROMPTS, folder, SMALL, name="t", report=lambda s, *_, loss=None: stages.append((s, _[-1])))
    assert {s for s, _ in stages} == {"sampling", "training", "measuring"}
    losses = [loss for stage, loss in stages if stage == "training" and loss is not None]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert found == Quality.load(folder)
    assert (found.layers, found.teacher) == ([0, 3], "t")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "distilled.json", "generation_config.json", "model.safetensors", "quality.json",
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(loaded.get_input_embeddings().weight, policy.model.get_input_embeddings().weight)
    raw = slim(policy.model, [0, 3])
    rows = collect(policy, PROMPTS, tmp_path, SMALL, report=lambda *_: None).heldout
    again = measure(policy, loaded, rows)
    assert again.kl == pytest.approx(found.kl, rel=1e-4)
    assert again.kl < 0.6 * measure(policy, raw, rows).kl
    assert Policy.load(folder).model.config.num_hidden_layers == 2


class _Stop:
    """Ctrl-C at the n-th call of a stage."""

    def __init__(self, stage: str, after: int) -> None:
        self.stage, self.left = stage, after

    def __call__(self, stage: str, *_: Any) -> None:
        self.left -= stage == self.stage
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_call_goes_on_to_the_same_student(tmp_path: Path) -> None:
    policy = teacher()
    distill(policy, PROMPTS, tmp_path / "whole", SMALL)
    for stage, after in (("sampling", 14), ("training", 3), ("training", 5), ("measuring", 1)):
        with pytest.raises(KeyboardInterrupt):
            distill(policy, PROMPTS, tmp_path / "parts", SMALL, report=_Stop(stage, after))
    distill(policy, PROMPTS, tmp_path / "parts", SMALL)
    whole, parts = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert Quality.load(tmp_path / "whole") == Quality.load(tmp_path / "parts")


def test_what_lies_in_the_folder_is_never_mixed_up(tmp_path: Path) -> None:
    policy = teacher()
    first = distill(policy, PROMPTS, tmp_path / "s", SMALL)
    assert distill(policy, PROMPTS, tmp_path / "s", SMALL) == first
    with pytest.raises(ValueError, match="epochs 2 instead of 3"):
        distill(policy, PROMPTS, tmp_path / "s", Settings(**{**vars(SMALL), "epochs": 3}))
    with pytest.raises(ValueError, match="another prompts"):
        distill(policy, PROMPTS[:5], tmp_path / "s", SMALL)
    with pytest.raises(ValueError, match="another teacher"):
        distill(teacher(seed=4), PROMPTS, tmp_path / "s", SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="something else"):
        distill(policy, PROMPTS, tmp_path / "other", SMALL)
    (tmp_path / "s" / "quality.json").write_text(json.dumps({"kl": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by"):
        Quality.load(tmp_path / "s")


@pytest.mark.parametrize(("name", "value"), [("layers", 0), ("tokens", 0), ("epochs", 0), ("learning_rate", 0.0)])
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]
