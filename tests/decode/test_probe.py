"""Probes: the minimum they claim, kinds of targets, files; states and heads' outputs are the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_models import TINY, tiny_gpt2, tiny_llama
from tokenloom.decode.hidden_states import head_outputs, states, states_at
from tokenloom.decode.layers import decoder_layers
from tokenloom.decode.minimize import minimize
from tokenloom.decode.probe import Probe

TEXTS = [[5, 9, 4], [8, 3, 11, 6, 7], [7], [9, 9, 10, 11]]


def cloud(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(60, 4, generator=g, dtype=torch.float64)
    noise = torch.randn(60, generator=g, dtype=torch.float64)
    return features, features @ torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64) + noise > 0


@pytest.mark.parametrize("balanced", [False, True])
def test_the_linear_probe_is_the_minimum_of_logistic_regression(balanced: bool) -> None:
    features, labels = cloud()
    labels[:20] = True  # uneven classes
    probe = Probe.fit(features, labels, l2=0.5, balanced=balanced)
    given = (features - features.mean(0)) / features.std(0, correction=0)
    linear = probe.net[0]
    assert isinstance(linear, nn.Linear)
    sizes = torch.stack([(~labels).sum(), labels.sum()])
    weights = 60 / (2 * sizes.double()) if balanced else torch.ones(2, dtype=torch.float64)
    pull = weights[labels.long()] * (labels.double() - probe(features).detach())
    torch.testing.assert_close(given.T @ pull, 0.5 * linear.weight[0].detach(), rtol=0, atol=1e-5)
    assert abs(float(pull.sum())) < 1e-5


def test_soft_targets_and_no_features_give_the_mean() -> None:
    probe = Probe.fit(torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.6, 0.9]))
    torch.testing.assert_close(probe(torch.zeros(1, 2)).detach(), torch.tensor([0.45]), rtol=0, atol=1e-5)


def test_one_hot_features_are_learned_without_error() -> None:
    features, classes = torch.eye(9), torch.arange(9) % 3
    for hidden in ((), (16,)):
        probe = Probe.fit(features, classes, classes=3, hidden=hidden, l2=0.01)
        found = probe(features)
        assert found.shape == (9, 3)
        assert found.argmax(-1).tolist() == classes.tolist()
        torch.testing.assert_close(found.sum(-1).detach(), torch.ones(9))


def test_hidden_layers_learn_what_a_line_cannot() -> None:
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([False, True, True, False])
    assert ((Probe.fit(corners, labels)(corners) >= 0.5) == labels).sum() < 4
    probes = [Probe.fit(corners, labels, hidden=(16,), l2=0.0, steps=200, seed=3) for _ in range(2)]
    assert ((probes[0](corners) >= 0.5) == labels).all()
    assert torch.equal(probes[0](corners), probes[1](corners))


def test_files_give_the_probe_back(tmp_path: Path) -> None:
    features, labels = cloud()
    for hidden, classes in (((), 1), ((8, 4), 2)):
        probe = Probe.fit(features.float(), labels, hidden=hidden, classes=classes, steps=5)
        probe.save(tmp_path / "new" / "probe.safetensors")
        again = Probe.load(tmp_path / "new" / "probe.safetensors")
        assert torch.equal(again(features), probe(features))
        assert (again.hidden, again.classes) == (hidden, classes)
    (tmp_path / "broken").write_text("no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Probe.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="not the tensors of a probe"):
        Probe.from_tensors({"mean": torch.zeros(2)})


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        Probe.fit(torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="classes="):
        Probe.fit(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="finite"):
        Probe.fit(torch.full((3, 2), torch.nan), torch.zeros(3))
    with pytest.raises(ValueError, match="another model"):
        Probe(4)(torch.zeros(1, 5))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_states_are_the_models_own_in_any_batch(name: str) -> None:
    model = TINY[name]()
    with torch.no_grad():
        outputs = [model(torch.tensor([t]), output_hidden_states=True).hidden_states for t in TEXTS]
    for batch in (1, 3, 16):
        found = states(model, TEXTS, batch=batch)
        torch.testing.assert_close(found, torch.stack([o[-1][0, -1] for o in outputs]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        states(model, TEXTS, layer=1, pool="mean"),
        torch.stack([o[1][0].mean(0) for o in outputs]),
        rtol=1e-4,
        atol=1e-5,
    )
    places = [[0, 2], [4, 1], [0], [3]]
    for found, output, at in zip(states_at(model, TEXTS, places), outputs, places, strict=True):
        torch.testing.assert_close(found, torch.stack([h[0, at] for h in output[1:]], 1), rtol=1e-4, atol=1e-5)


def test_states_leave_the_model_as_it_was() -> None:
    model = tiny_gpt2()
    model.train()
    first = states(model, TEXTS)
    assert model.training
    assert model.transformer.drop.training
    assert torch.equal(first, states(model, TEXTS))


@pytest.mark.parametrize("name", sorted(TINY))
def test_head_outputs_are_what_the_projection_reads(name: str) -> None:
    model = TINY[name]()
    projected: list[torch.Tensor] = []
    attention = next(m for n, m in decoder_layers(model)[1].named_children() if n in ("self_attn", "attn"))
    projection = next(m for n, m in attention.named_children() if n in ("o_proj", "c_proj", "out_proj", "dense"))
    handle = projection.register_forward_hook(lambda module, given, output: projected.append(output))
    with torch.no_grad(), head_outputs(model) as last:
        model(torch.tensor([[5, 9, 4]]))
        found = last()
        handle.remove()
        assert found.shape[:4] == (1, 3, 2, 2)
        torch.testing.assert_close(projection(found[:, :, 1].flatten(2)), projected[0])
    assert not projection._forward_pre_hooks


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        states(tiny_llama(), [[1], []])
    with pytest.raises(ValueError, match="'last' or 'mean'"):
        states(tiny_llama(), [[1]], pool="max")
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="lower the learning rate"):
        minimize([weight], 1, lambda rows: weight.sum() * torch.nan, epochs=1, batch=1, learning_rate=1.0)
    with pytest.raises(ValueError, match="nothing to train on"):
        minimize([weight], 0, lambda rows: weight.sum(), epochs=1, batch=1, learning_rate=1.0)


def test_training_sees_every_row_once_an_epoch() -> None:
    weight, seen, steps = nn.Parameter(torch.tensor([4.0])), list[int](), list[tuple[int, int]]()

    def loss(rows: list[int]) -> torch.Tensor:
        seen.extend(rows)
        return (weight - 1).square().sum()

    minimize([weight], 5, loss, epochs=40, batch=2, learning_rate=0.1, progress=lambda d, n, v: steps.append((d, n)))
    assert sorted(seen) == sorted(list(range(5)) * 40)
    assert seen[:5] != seen[5:10]
    assert steps[0] == (1, 120)
    assert steps[-1] == (120, 120)
    assert abs(weight.item() - 1) < 0.05
