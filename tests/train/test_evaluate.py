"""Evaluation: accuracies of a policy with known answers, pass@k, and intervals that cover."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenloom.batch import Rollouts, Sampling
from tokenloom.tasks import Item
from tokenloom.train.evaluate import bootstrap, evaluate, pass_at_k, wilson
from tokenloom.train.respond import Responder, Responses
from tokenloom.train.session import Session
from train.setups import EVAL, Tiny, lines


class Known(Responder):
    """Item i is right in the first `hits[i]` of its samples, and greedily when `hits[i]` > 1."""

    def __init__(self, hits: list[int]) -> None:
        self.hits = hits
        self.calls: list[Sampling] = []

    def respond(
        self, items: Any, sampling: Sampling, *, copies: int, generator: torch.Generator, **_: Any
    ) -> Responses:
        self.calls.append(sampling)
        right = [
            (self.hits[i] > 1 if sampling.temperature == 0 else copy < self.hits[i])
            for i in range(len(items))
            for copy in range(copies)
        ]
        groups = [i for i in range(len(items)) for _ in range(copies)]
        rollouts = Rollouts.build([[1]] * len(right), [[2]] * len(right), groups)
        rollouts = rollouts.replace(rewards=torch.tensor(right).float(), answers=tuple(range(len(right))))
        return Responses(rollouts, [f"text {i}" for i in range(len(right))], right, 0, [])


ITEMS = [Item(None, f"prompt {i}", str(i), {}) for i in range(4)]


def test_accuracies_are_counted() -> None:
    responder = Known([0, 1, 2, 4])
    result = evaluate(responder, ITEMS, max_tokens=5, samples=4, temperature=0.7, stop=("x",), seed=3)
    assert result.greedy == 0.5
    assert result.sampled == 7 / 16
    assert result.correct == [0, 1, 2, 4]
    assert [c.temperature for c in responder.calls] == [0.0, 0.7]
    assert all(c.max_tokens == 5 and c.stop == ("x",) for c in responder.calls)
    assert result.record(9) == {
        "step": 9, "kind": "eval", "greedy": 0.5, "sampled": 7 / 16, "samples": 4, "problems": 4,
    }  # fmt: skip
    shown = result.greedy_answers[3]
    assert shown == {
        "prompt": "prompt 3", "expected": "3", "response": "text 3", "answer": 3, "reward": 1.0, "correct": True,
    }  # fmt: skip
    assert pass_at_k(result.correct, 4, 4) == 0.75


def test_greedy_alone_samples_nothing() -> None:
    responder = Known([0, 2, 2, 2])
    result = evaluate(responder, ITEMS, max_tokens=5)
    assert result.greedy == 0.75
    assert result.sampled is None
    assert len(responder.calls) == 1
    assert "sampled" not in result.record(0)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no problems"):
        evaluate(Known([]), [], max_tokens=5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_choices(n: int) -> None:
    for k in range(1, n + 1):
        for c in range(n + 1):
            samples = [i < c for i in range(n)]
            chosen = list(itertools.combinations(samples, k))
            assert pass_at_k([c], n, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    counts = list(range(n + 1))
    assert pass_at_k(counts, n, 1) == pytest.approx(sum(counts) / len(counts) / n)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"got k={k} with 4 samples"):
        pass_at_k([1], 4, k)


def test_the_interval_of_a_proportion_covers_it() -> None:
    """The exact chance, over all outcomes of n trials, that Wilson's interval holds the true p; nominally 0.95."""
    n = 50
    coverage = []
    for p in (0.05, 0.2, 0.5, 0.8, 0.97):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        coverage.append(sum(w for c, w in enumerate(chance) if wilson(c / n, n)[0] <= p <= wilson(c / n, n)[1]))
    assert min(coverage) > 0.91
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.02)
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(1.0, 10)[1] == 1.0
    assert wilson(0.0, 10)[1] > 0.2
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # worked by hand


def test_the_interval_over_problems_covers_the_mean() -> None:
    """Problems differ in difficulty: 300 simulated evaluations of 40 problems with Beta(1/2, 1/2) success rates."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(300):
        rates = torch.sin(math.pi / 2 * torch.rand(40, generator=generator)) ** 2  # arcsine law, mean 1/2
        means = torch.bernoulli(rates[:, None].expand(40, 4), generator=generator).mean(1)
        low, high = bootstrap(means.tolist(), draws=400, seed=trial)
        covered += low <= 0.5 <= high
    # Percentile intervals of 40 problems cover a little less than 0.95; 4 standard errors of 300 trials are 0.05.
    assert 0.88 < covered / 300 < 0.99


def test_the_interval_of_a_constant_is_the_constant() -> None:
    assert bootstrap([0.25] * 5) == (0.25, 0.25)
    assert bootstrap([0.0, 1.0, 1.0], seed=1) == bootstrap([0.0, 1.0, 1.0], seed=1)


def test_an_environment_is_evaluated_through_episodes(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(task={"environment": "calculator"}, train={"eval": EVAL | {"problems": 8, "samples": 3}})
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        result = trainer._evaluate(0, None)
        # Without calls the calculator scores like its verifier.
        trainer.examiner.environment = None
        plain = trainer._evaluate(0, None)
    assert result.problems == 8
    assert result.greedy == plain.greedy
    assert len(result.correct) == 8
    assert result.sampled is not None
    assert sum(result.correct) == round(result.sampled * 24)
    assert [a["answer"] for a in result.greedy_answers] == [a["answer"] for a in plain.greedy_answers]


def test_evaluating_changes_nothing_and_repeats(tiny: Tiny, tmp_path: Path) -> None:
    with Session(tiny.recipe(), tmp_path, []) as session:
        state = torch.get_rng_state()
        first = session.trainer._evaluate(0, 2)
        second = session.trainer._evaluate(0, 2)
        assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert len(lines(tmp_path)) == 2
