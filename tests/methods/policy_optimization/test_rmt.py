"""RMT: a budget by progress, a law of tiers, a reward that mixes outcome and length, a loss over a corpus."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.policy_optimization.batch import (
    INF,
    NAN,
    close,
    coefficients_of,
    defaults,
    make,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.catalog import part, parts
from tokenloom.methods.policy_optimization.rmt import next_token, rmt, tier_probabilities, token_budget
from tokenloom.signals import Signals

FIRST = {"easy": 0.7, "medium": 0.2, "hard": 0.1}
LAST = {"easy": 0.1, "medium": 0.3, "hard": 0.6}


def test_defaults() -> None:
    expected = {
        "length": 0.2, "peak": 1.0, "budget": 800.0, "decay": 0.2, "min_budget": 1, "end_of_thinking": None,
    }  # fmt: skip
    assert defaults("rmt") == expected
    assert preset_defaults("rmt") == expected | {"ntp_coef": 0.1}


# -- budget and tiers


def test_budget_by_progress() -> None:
    assert [token_budget(x) for x in (0.0, 0.5, 1.0)] == [800, 357, 160]
    budgets = [token_budget(i / 100) for i in range(101)]
    assert budgets == sorted(budgets, reverse=True)
    assert token_budget(1.0, budget=3.0, min_budget=2) == 2
    assert token_budget(0.7, decay=1.0) == 800
    assert token_budget(2.0, budget=100, decay=0.7) == 49  # 100 * 0.7 * 0.7 is a hair below 49


@pytest.mark.parametrize("wrong", [{"budget": 0.5}, {"decay": 0.0}, {"decay": 1.1}, {"min_budget": 0}])
def test_impossible_budgets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a budget needs"):
        token_budget(0.0, **wrong)


def test_tiers_sum_to_one_and_are_continuous() -> None:
    for i in range(101):
        law = tier_probabilities(i / 100, FIRST, LAST)
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        assert min(law.values()) >= 0
    assert tier_probabilities(0.0, FIRST, LAST) == tier_probabilities(0.3, FIRST, LAST) == FIRST
    assert tier_probabilities(1.0, FIRST, LAST) == tier_probabilities(0.7, FIRST, LAST) == pytest.approx(LAST)
    for edge in (0.3, 0.7):
        before, after = (tier_probabilities(edge + d, FIRST, LAST) for d in (-1e-9, 1e-9))
        # The steepest share moves by 0.6 over 0.4 of the run.
        assert all(abs(before[t] - after[t]) <= 2e-9 * 0.6 / 0.4 + 1e-15 for t in FIRST)
    middle = tier_probabilities(0.5, FIRST, LAST)
    assert middle == pytest.approx({"easy": 0.4, "medium": 0.25, "hard": 0.35})


@pytest.mark.parametrize(
    ("first", "last", "moments", "says"),
    [
        (FIRST, {"easy": 1.0}, {}, "a share for every tier"),
        (FIRST, LAST | {"hard": 0.7}, {}, "sum to 1"),
        ({"easy": 1.5, "hard": -0.5}, {"easy": 1.0, "hard": 0.0}, {}, ">= 0"),
        ({}, {}, {}, "sum to 1"),
        (FIRST, LAST, {"begin": 0.7, "end": 0.7}, "begin < end"),
        (FIRST, LAST, {"end": 1.1}, "end <= 1"),
    ],
)
def test_impossible_laws_are_refused(first: Any, last: Any, moments: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tier_probabilities(0.5, first, last, **moments)


# -- the reward


def rewards_of(lengths: list[int], outcomes: list[float], step: int = 0, prompts: Any = None, **rest: Any) -> Any:
    mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    return rmt(vector(*outcomes), tokens, mask, step, 100, prompts, **rest)


def test_reward_worked_numbers() -> None:
    # B = 20, w = .25: lengths 0, 10, 20, 30, 40 earn 0, .5, 1, .5, 0 of r_max = 2.
    found = rewards_of([0, 10, 20, 30, 40], [1.0, 1.0, 0.0, 0.0, 1.0], length=0.25, peak=2.0, budget=20.0)
    close(found, [0.75, 0.75 + 0.25, 0.5, 0.25, 0.75])
    # Halfway B = floor(20 * sqrt(.2)) = 8.
    close(rewards_of([8, 4], [1.0, 0.0], step=50, budget=20.0), [0.8 + 0.2, 0.1])
    close(rewards_of([8], [NAN]).isnan().double(), [1.0])


def test_the_budget_that_stood_in_the_prompt_counts() -> None:
    prompts: tuple[dict[str, Any], ...] = ({"budget": 40}, {}, {"budget": 10})
    close(rewards_of([20, 20, 10], [0.0] * 3, prompts=prompts, budget=20.0, length=1.0), [0.5, 1, 1])
    with pytest.raises(ValueError, match="at least one token, got 0"):
        rewards_of([1], [0.0], prompts=({"budget": 0},))
    with pytest.raises(ValueError, match=r"share of the reward, in \[0, 1\], got 1.5"):
        rewards_of([1], [0.0], length=1.5)


def test_a_run_without_an_end_stays_at_the_first_budget() -> None:
    mask = torch.ones(1, 20, dtype=torch.bool)
    found = rmt(vector(0.0), torch.zeros(1, 20).long(), mask, 10**6, None, budget=20.0, length=1.0)
    close(found, [1.0])


def test_without_length_and_corpus_it_is_grpo_on_the_match() -> None:
    rollouts, signals = synthetic_batch()
    plain = make("rmt", length=0.0, ntp_coef=0.0)
    assert plain.corpus == ()
    assert plain.corpus_needs == frozenset()
    grpo = coefficients_of(make("grpo", kl_coef=0.0), rollouts, signals)
    close(coefficients_of(plain, rollouts, signals), grpo)
    assert not torch.allclose(coefficients_of(make("rmt"), rollouts, signals), grpo, rtol=1e-6, atol=1e-9)


# -- terms over a corpus


def text(seed: int = 0) -> tuple[Rollouts, Signals]:
    """5 rows of at most 6 tokens, some left to RL, one row without any; entropies beside log-probs."""
    g = torch.Generator().manual_seed(seed)
    lengths = [6, 4, 6, 1, 5]
    mask = [[j < n and bool(torch.rand((), generator=g) > 0.3) for j in range(6)] for n in lengths]
    mask[2] = [False] * 6
    rollouts = rollouts_of([0.0] * 5, [0, 1, 2, 3, 4], mask).replace(lengths=torch.tensor(lengths), rewards=None)
    logprobs = -torch.rand(5, 6, generator=g, dtype=torch.float64)
    return rollouts, Signals(logprobs=logprobs, entropies=torch.rand(5, 6, generator=g, dtype=torch.float64))


def corpus_gradient(algorithm: Algorithm, rollouts: Rollouts, signals: Signals, split: Any, **when: Any) -> Any:
    """(loss, gradient [B, T]) summed over micro-batches."""
    assert signals.logprobs is not None
    leaf = signals.logprobs.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in split:
        at = None if rows is None else torch.tensor(rows)
        here = signals.replace(logprobs=leaf) if at is None else signals.replace(logprobs=leaf).rows(at)
        total = total + algorithm.corpus_loss(here, rollouts, at, **when)[0]
    (grad,) = torch.autograd.grad(total, leaf)
    return total.detach(), grad


SPLITS = ([None], [[0, 1, 2, 3, 4]], [[4, 2], [0], [3, 1]], [[0], [1], [2], [3], [4]])


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_is_the_mean_nll(split: Any) -> None:
    rollouts, signals = text()
    assert signals.logprobs is not None
    found, gradient = corpus_gradient(make("rmt", ntp_coef=0.3), rollouts, signals, split)
    close(found, 0.3 * float(-signals.logprobs[rollouts.mask].mean()))
    close(gradient, -0.3 * rollouts.mask.double() / int(rollouts.mask.sum()))


def test_metrics_add_up() -> None:
    rollouts, signals = text()
    assert signals.logprobs is not None
    algorithm = make("rmt")
    whole = algorithm.corpus_loss(signals, rollouts)[1].result()
    nll = float(-signals.logprobs[rollouts.mask].mean())
    expected = {"corpus/rmt/next-token/mean": nll, "loss": 0.1 * nll, "loss/corpus/rmt/next-token": nll}
    assert whole == pytest.approx(expected)
    halves = [algorithm.corpus_loss(signals.rows(r), rollouts, r)[1] for r in torch.arange(5).split(2)]
    assert halves[0].merge(halves[1:]).result() == pytest.approx(expected)


def test_hostile_values_off_the_mask_do_not_leak() -> None:
    rollouts, signals = text()
    assert signals.logprobs is not None
    algorithm = make("rmt")
    expected = corpus_gradient(algorithm, rollouts, signals, [None])
    for hostile in (NAN, INF, -INF):
        bad = signals.replace(logprobs=signals.logprobs.masked_fill(~rollouts.mask, hostile))
        for split in SPLITS:
            found = corpus_gradient(algorithm, rollouts, bad, split)
            close(found[0], float(expected[0]))
            close(found[1], expected[1])


def test_the_coefficient_may_be_a_schedule() -> None:
    rollouts, signals = text()
    algorithm = make("rmt", ntp_coef={"schedule": "linear", "start": 0.4, "end": 0.0})
    fixed = make("rmt", ntp_coef=0.3)
    found = corpus_gradient(algorithm, rollouts, signals, [None], step=25, total_steps=100)
    close(found[1], corpus_gradient(fixed, rollouts, signals, [None])[1])


def test_every_term_has_its_own_aggregate_and_weights() -> None:
    @part("test/second-half", stage="weight", scope="row", paper="none")
    def second_half(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return (mask & (torch.arange(mask.shape[1])[None] >= lengths[:, None] / 2)).double()

    rollouts, signals = text()
    terms = [
        {"part": "rmt/next-token", "coef": 2.0, "aggregate": "sequence-mean"},
        {"part": "rmt/next-token", "aggregate": {"part": "token-mean", "count": "weights"},
         "weight": ["test/second-half"]},
    ]  # fmt: skip
    try:
        algorithm = Algorithm.compose(advantage="grpo", corpus=terms)
    finally:
        parts().pop("test/second-half")  # so that no other test, nor the pinned count of laws, sees it
    mask = rollouts.mask
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    late = second_half(mask, rollouts.lengths)
    expected = -2 * mask.double() / counts / int(mask.any(-1).sum()) - late / late.sum()
    for split in SPLITS:
        close(corpus_gradient(algorithm, rollouts, signals, split)[1], expected)


def test_the_recipe_comes_back() -> None:
    algorithm = make("rmt", ntp_coef=0.3)
    assert Algorithm.from_recipe(algorithm.recipe()).corpus == algorithm.corpus
    assert any(line.startswith("corpus ") and "rmt/next-token" in line for line in algorithm.describe())
    changed = Algorithm.from_recipe({"preset": "rmt", "corpus": {"rmt/next-token": {"coef": 0.7}}})
    assert [t.coef for t in changed.corpus] == [0.7]
    assert Algorithm.from_recipe({"preset": "rmt", "corpus": None}).corpus == ()
    assert [t.part.part.name for t in make("grpo").override(corpus="rmt/next-token").corpus] == ["rmt/next-token"]


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"part": "kl", "estimator": "k3"}, r"corpus: part 'kl' reads \['ref_logprobs'\], which rows of plain text"),
        ({"part": "rmt/next-token", "aggregate": "balanced-aggregation"}, "'balanced-aggregation' reads"),
        ({"part": "rmt/next-token", "weight": ["vapo/positive"]}, r"'vapo/positive' reads \['outcomes'\]"),
        ({"part": "grpo"}, "grpo"),
    ],
)
def test_what_plain_text_lacks_is_named(term: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make("grpo").override(corpus=[term])
    with pytest.raises(ValueError, match="give the term an aggregate of its own"):
        make("balanced-aggregation").override(corpus=["rmt/next-token"])


def test_missing_signals_are_named() -> None:
    rollouts, signals = text()
    with pytest.raises(ValueError, match=r"need the signals \['logprobs'\]"):
        make("rmt").corpus_loss(signals.replace(logprobs=None), rollouts)
    with pytest.raises(ValueError, match=r"signals are \(5, 6\), the corpus rows \(2, 6\)"):
        make("rmt").corpus_loss(signals, rollouts, torch.arange(2))


def test_next_token_is_the_negative_logprob() -> None:
    close(next_token(row(-0.5, -2.0, NAN), torch.tensor([[True, True, False]])), row(0.5, 2.0, 0.0))


def test_terms_over_a_corpus_leave_the_coefficients_alone() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]])
    signals = signals_of(rollouts)
    close(
        coefficients_of(make("rmt"), rollouts, signals), coefficients_of(make("rmt", ntp_coef=0.0), rollouts, signals)
    )
