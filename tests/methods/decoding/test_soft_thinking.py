"""Soft Thinking's rules: cuts in their order, mixtures bit by bit, entropy, the cold stop's exact step."""

from __future__ import annotations

import math

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.soft_thinking import cold_stop, concept, entropy, mixture

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
