"""R2R's rules: routing at its limits, the network against one written out, the loss, thresholds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.r2r import (
    Router,
    active_parameters,
    positive_weight,
    recall_threshold,
    route,
    route_by_entropy,
    router_loss,
    usage_threshold,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_routing_and_its_limits() -> None:
    scores = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    assert route(scores).tolist() == [False, False, True, True, True]
    assert not bool(route(scores, threshold=1.1).any())
    assert bool(route(scores, threshold=0.0).all())
    assert route(scores, threshold=0.7).tolist() == [False, False, False, True, True]


def test_routing_by_entropy_in_nats() -> None:
    laws = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.8, 0.2, 0.0]], dtype=torch.float64)
    # Entropies .693, .325, .500.
    assert route_by_entropy(laws.log()).tolist() == [True, False, True]
    assert route_by_entropy(laws.log(), threshold=math.log(2)).tolist() == [False] * 3


def test_the_network_written_out() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        router = Router(random(11, 4), top=5, width=6, blocks=2).eval()
    hidden, logits, tokens = random(3, 4, seed=1), random(3, 5, seed=2), torch.tensor([7, 0, 10])
    p = dict(router.named_parameters())
    x = torch.cat((hidden, p["embeddings.weight"][tokens], logits @ p["logits.weight"].T + p["logits.bias"]), -1)
    for name in ("combine", "enter"):
        x = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    for b in range(2):
        y = functional.layer_norm(x, (6,), p[f"blocks.{b}.norm.weight"], p[f"blocks.{b}.norm.bias"], 1e-5)
        y = y @ p[f"blocks.{b}.mlp.0.weight"].T + p[f"blocks.{b}.mlp.0.bias"]
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + y @ p[f"blocks.{b}.mlp.3.weight"].T + p[f"blocks.{b}.mlp.3.bias"]
    x = functional.layer_norm(x, (6,), p["leave.0.weight"], p["leave.0.bias"], 1e-5)
    expected = (x @ p["leave.1.weight"].T + p["leave.1.bias"])[:, 0]
    torch.testing.assert_close(router(hidden, logits, tokens), expected, rtol=1e-5, atol=1e-6)
    assert p["blocks.0.mlp.0.weight"].shape == (24, 6)
    assert not p["embeddings.weight"].requires_grad


def test_the_size_of_the_paper() -> None:
    router = Router(torch.zeros(3, 8))
    assert router.shape == {"top": 100, "width": 1024, "blocks": 6}
    per_block = 2 * 1024 + 2 * 4 * 1024 * 1024 + 5 * 1024
    assert sum(p.numel() for p in router.blocks.parameters()) == 6 * per_block


def test_the_loss_weighs_positives() -> None:
    scores = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 1.0])
    expected = (3 * math.log(2) + math.log1p(math.exp(2)) + 3 * math.log1p(math.e)) / 3
    close(router_loss(scores, labels, positive_weight=3.0), expected)
    assert positive_weight(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 3.0
    assert positive_weight(torch.tensor([1.0, 0.0, 0.0, 0.0]), recall_factor=2.0) == 6.0
    assert positive_weight(torch.zeros(3)) == positive_weight(torch.ones(3)) == 1.0


@pytest.mark.parametrize("recall", [0.05, 0.5, 0.9, 0.95, 1.0])
def test_the_threshold_is_the_largest_with_that_recall(recall: float) -> None:
    scores, labels = random(400, seed=3).double(), (random(400, seed=4) > 0.4).double()
    scores = scores + labels
    threshold = recall_threshold(scores, labels, recall=recall)

    def recalled(t: float) -> float:
        return float((torch.sigmoid(scores)[labels > 0.5] >= t).double().mean())

    assert recalled(threshold) >= recall - 1e-12
    assert recalled(threshold + 1e-12) < recall
    assert bool((route(scores, threshold=threshold)[labels > 0.5].double().mean()) >= recall - 1e-12)


def test_recall_is_not_missed_by_rounding() -> None:
    scores = torch.arange(20, dtype=torch.float64)
    assert recall_threshold(scores, torch.ones(20)) == float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    with pytest.raises(ValueError, match="positive labels"):
        recall_threshold(scores, torch.zeros(20))


def test_a_usage_is_never_exceeded() -> None:
    scores = random(200, seed=5).double()
    for usage in (0.0, 0.1, 0.33, 1.0):
        assert float(route(scores, threshold=usage_threshold(scores, usage=usage)).double().mean()) == pytest.approx(
            usage, abs=0.005
        )
    assert not bool(route(torch.zeros(4), threshold=usage_threshold(torch.zeros(4), usage=0.5)).any())


def test_average_active_parameters() -> None:
    assert active_parameters(1.5, 32.0, 0.125) == 5.5
