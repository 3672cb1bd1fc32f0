"""Soft Thinking's rules: cuts in their order, mixtures bit by bit, entropy, the cold stop's exact step."""

from __future__ import annotations

import math

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.soft_thinking import (
    cold_stop,
    concept,
    dirichlet_noise,
    entropy,
    gumbel_noise,
    mixture,
)

P = torch.tensor([[0.05, 0.4, 0.25, 0.2, 0.1]], dtype=torch.float64)


def test_worked_numbers_of_each_cut_alone() -> None:
    open_cuts = {"top_k": 5, "top_p": 1.0, "min_p": 0.0, "max_topk": 5}
    weights, ids = concept(P, **open_cuts)
    assert ids.tolist() == [[1, 2, 3, 4, 0]]
    close(weights, P.sort(descending=True).values)
    weights, ids = concept(P, **open_cuts | {"top_k": 2})
    assert ids.tolist() == [[1, 2]]
    close(weights, [[40 / 65, 25 / 65]])
    close(concept(P, **open_cuts | {"top_p": 0.6})[0], [[40 / 65, 25 / 65, 0, 0, 0]])
    close(concept(P, **open_cuts | {"min_p": 0.45})[0], [[40 / 85, 25 / 85, 20 / 85, 0, 0]])
    close(concept(P, **open_cuts | {"max_topk": 3})[0], [[40 / 85, 25 / 85, 20 / 85]])


def test_the_top_p_is_one_of_what_the_top_k_left() -> None:
    # Of (.4, .25, .2) renormalized, .4 / .85 = .47 is below .5 and the second reaches it.
    close(concept(P, top_k=3, top_p=0.5, min_p=0.0)[0], [[40 / 65, 25 / 65, 0]])


def test_mixtures_sum_to_one_and_one_is_greedy() -> None:
    probs = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).softmax(-1)
    weights, ids = concept(probs)
    assert weights.shape == ids.shape == (50, 10)
    close(weights.sum(-1), 1.0)
    weights, ids = concept(probs, max_topk=1)
    assert torch.equal(weights, torch.ones(50, 1).double())
    assert torch.equal(ids[:, 0], probs.argmax(-1))
    assert concept(torch.full((1, 4), 0.25), max_topk=1)[1].item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_certain_mixture_is_the_embedding_bit_by_bit(dtype: torch.dtype) -> None:
    table = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights, ids = concept(torch.eye(9)[[4, 8]])
    table[0] = torch.inf
    assert torch.equal(mixture(weights, table[ids]), table[[4, 8]])


def test_mixture_is_the_weighted_sum() -> None:
    table = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights, ids = concept(P)
    expected = sum(w * table[i] for w, i in zip(weights[0], ids[0], strict=True))
    close(mixture(weights, table[ids])[0], expected)


def test_entropy_in_nats() -> None:
    close(entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)), [math.log(2), 0.0])


def test_the_cold_stop_fires_at_exactly_the_last_step_of_a_run() -> None:
    low, high = 0.005, 0.02
    run = torch.zeros(2, dtype=torch.int64)
    fired = []
    for a, b in [(low, low), (low, low), (low, high), (low, low), (high, low), (low, low)]:
        run, stop = cold_stop(torch.tensor([a, b]), run, length=3)
        fired.append(stop.tolist())
    assert fired == [[False, False]] * 2 + [[True, False], [True, False], [False, False], [False, True]]
    assert run.tolist() == [1, 3]
    none, never = cold_stop(torch.zeros(1), torch.tensor([10]), threshold=0.0, length=1)
    assert not bool(never)
    assert none.item() == 0
    assert bool(cold_stop(torch.ones(1), torch.zeros(1), length=0)[1])


def test_cuts_that_keep_nothing_are_refused() -> None:
    for settings in ({"top_k": 0}, {"max_topk": 0}, {"top_p": 0.0}, {"min_p": 1.5}):
        with pytest.raises(ValueError, match="soft-thinking"):
            concept(P, **settings)


Q = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
IDS = torch.tensor([[7, 3, 9, 1]])
N = 20_000


def noise(shapes: torch.Tensor, seed: int) -> torch.Tensor:
    return RandomDraw(torch.Generator().manual_seed(seed)).gamma(shapes)


def test_gumbel_noise_worked_by_hand() -> None:
    # exp((log q + g) / tau) = (q / e)^(1 / tau): (.25, .6, .1) squared at tau = 1/2.
    exponentials = torch.tensor([[2.0, 0.5, 2.0, 1e-9]], dtype=torch.float64)
    weights, ids = gumbel_noise(Q, IDS, exponentials)
    total = 0.25**2 + 0.6**2 + 0.1**2
    close(weights, [[0.36 / total, 0.0625 / total, 0.01 / total, 0.0]])
    assert ids.tolist() == [[3, 7, 9, 1]]
    close(gumbel_noise(Q, IDS, torch.ones_like(Q), temperature=1.0)[0], Q)


def test_the_largest_under_gumbel_noise_is_a_draw_from_q() -> None:
    many = Q.expand(N, 4)
    for temperature in (0.5, 2.0):
        weights, ids = gumbel_noise(many, IDS.expand(N, 4), noise(torch.ones(N, 4), 1), temperature=temperature)
        close(weights.sum(-1), 1.0)
        counts = torch.bincount(ids[:, 0], minlength=10)[[7, 3, 9]].double()
        # A chi-square statistic of two degrees of freedom: above 18.4 with probability 1e-4.
        assert float(((counts - N * Q[0, :3]) ** 2 / (N * Q[0, :3])).sum()) < 18.4
        assert counts.sum() == N
    sharp, _ = gumbel_noise(many, IDS.expand(N, 4), noise(torch.ones(N, 4), 1), temperature=1e-6)
    assert float((sharp[:, 0] > 0.999).double().mean()) > 0.999


@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0])
def test_dirichlet_noise_has_the_moments_of_its_law(alpha: float) -> None:
    gammas, exponentials = noise((alpha * Q + 1).expand(N, 4), 2), noise(torch.ones(N, 4), 3)
    weights, ids = dirichlet_noise(Q.expand(N, 4), IDS.expand(N, 4), gammas, exponentials, alpha=alpha)
    close(weights.sum(-1), 1.0)
    assert bool((weights.diff(dim=-1) <= 0).all())
    assert bool((ids[:, 3] == 1).logical_or(weights[:, 3] == 0).all())
    by_id = torch.zeros(N, 10, dtype=torch.float64).scatter(1, ids, weights)[:, [7, 3, 9, 1]]
    variance = Q[0] * (1 - Q[0]) / (alpha + 1)
    # Five standard errors of a mean; a variance of values in [0, 1] has a standard error below sqrt(variance / N).
    assert bool(((by_id.mean(0) - Q[0]).abs() <= 5 * (variance / N).sqrt()).all())
    assert bool(((by_id.var(0) - variance).abs() <= 5 * (variance / N).sqrt()).all())
    assert bool((by_id[:, 3] == 0).all())


def test_dirichlet_noise_worked_by_hand_and_its_limit() -> None:
    # Gamma variates g exp(-e / (alpha q)): 1, 4 exp(-2), 3 exp(-5 / 2) at alpha = 2.
    gammas = torch.tensor([[1.0, 4.0, 3.0, 1.0]], dtype=torch.float64)
    exponentials = torch.tensor([[0.0, 1.2, 1.0, 1.0]], dtype=torch.float64)
    values = [1.0, 4 * math.exp(-2), 3 * math.exp(-2.5), 0.0]
    weights, ids = dirichlet_noise(Q, IDS, gammas, exponentials, alpha=2.0)
    close(weights, [[v / sum(values) for v in values]])
    assert ids.tolist() == IDS.tolist()
    gammas = noise(1e8 * Q + 1, 4)
    close(dirichlet_noise(Q, IDS, gammas, noise(torch.ones(1, 4), 5), alpha=1e8)[0], Q, 1e-3)


def test_a_certain_mixture_has_nothing_to_disturb() -> None:
    weights, ids = concept(torch.eye(9)[[4, 8]])
    ones = noise(torch.ones(2, 9), 6).float()
    for found in (
        gumbel_noise(weights, ids, ones),
        dirichlet_noise(weights, ids, noise(weights + 1, 7).float(), ones, alpha=0.01),
    ):
        assert torch.equal(found[0], weights)
        assert torch.equal(found[1], ids)


def test_noise_that_is_none_is_refused() -> None:
    ones = torch.ones_like(Q)
    with pytest.raises(ValueError, match="temperature"):
        gumbel_noise(Q, IDS, ones, temperature=0.0)
    with pytest.raises(ValueError, match="alpha"):
        dirichlet_noise(Q, IDS, ones, ones, alpha=0.0)
