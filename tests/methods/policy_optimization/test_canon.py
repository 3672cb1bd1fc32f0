"""CANON: groups cut in two by a metric, compared across and within the halves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.canon import (
    annealed,
    at_random,
    by_length,
    canon,
    conditional,
    cosine,
    restarted_cosine,
    upper_half,
)
from tokenloom.methods.policy_optimization.dr_grpo import group_centered

REWARDS, METRIC = vector(1.0, 1.0, 0.0, 1.0), vector(0.1, 0.4, 0.2, 0.3)
GROUP = torch.zeros(4, dtype=torch.int64)


def found_for(mu: float, alpha: float = 1.0, side: str = "low", rewards: Tensor = REWARDS) -> Tensor:
    return conditional(rewards, GROUP, METRIC, mu, alpha, side)  # type: ignore[arg-type]


def literal(rewards: list[float], metric: list[float], mu: float, alpha: float, alpha_on: str) -> list[float]:
    """The formula of the sheet for one group, row by row."""
    order = sorted(range(len(rewards)), key=lambda i: metric[i])
    half = len(rewards) // 2
    low, high = order[:half], order[half:]
    mean_low, mean_high = (sum(rewards[i] for i in side) / len(side) for side in (low, high))
    out = [0.0] * len(rewards)
    for i, r in enumerate(rewards):
        if i in high and alpha_on == "high":
            inter, intra = alpha * r - mean_low, r - mean_high
        elif i in high:
            inter, intra = r - alpha * mean_low, r - mean_high
        elif alpha_on == "high":
            inter, intra = r - alpha * mean_high, r - mean_low
        else:
            inter, intra = alpha * r - mean_high, r - mean_low
        out[i] = mu * inter + (1 - mu) * intra
    return out


def test_defaults() -> None:
    assert defaults("canon") == {"mu": 1.0, "alpha": 1.0, "alpha_on": "low", "tie": "order"}
    assert defaults("canon/length") == {"mu": 1.0, "alpha": 1.0, "alpha_on": "high", "tie": "order"}
    assert defaults("canon/cosine") == {"first": "inter", "warmup": 30, "total": 150, "cycles": 3, "tie": "order"}
    assert preset_defaults("canon") == {"metric": "entropy", "mu": 1.0, "alpha": 1.0, "schedule": "constant"}
    algorithm = make("canon")
    assert algorithm.bounds.params == {"low": 0.2, "high": 0.28}
    assert (algorithm.aggregate.part.name, algorithm.terms) == ("dr-grpo/constant-length", ())


@pytest.mark.parametrize(
    ("mu", "advantages"),
    [(1.0, [0, 0.5, -1, 0.5]), (0.0, [0.5, 0, -0.5, 0]), (0.5, [0.25, 0.25, -0.75, 0.25])],
)
def test_worked_numbers(mu: float, advantages: list[float]) -> None:
    close(found_for(mu), advantages)
    entropies = METRIC[:, None].expand(4, 3)
    close(canon(REWARDS, GROUP, entropies, ones(4, 3), mu=mu), torch.tensor(advantages).double()[:, None].expand(4, 3))


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_advantages_of_even_groups_sum_to_zero(mu: float) -> None:
    g = torch.Generator().manual_seed(1)
    rewards, metric = torch.rand(8, generator=g).double(), torch.rand(8, generator=g).double()
    close(conditional(rewards, torch.tensor([0, 0, 1, 0, 1, 1, 1, 0]), metric, mu).sum(), 0.0)


@pytest.mark.parametrize("size", [2, 4, 10])
def test_half_and_half_is_dr_grpo_for_even_groups(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    rewards, entropies = torch.rand(size, generator=g).double(), torch.rand(size, 3, generator=g).double()
    group, mask = torch.zeros(size, dtype=torch.int64), ones(size, 3)
    close(canon(rewards, group, entropies, mask, mu=0.5), group_centered(rewards, group, mask))


def test_half_and_half_is_the_dr_grpo_preset_on_even_groups() -> None:
    rollouts, signals = synthetic_batch()
    rows = torch.tensor([0, 2, 1, 3, 5, 8])
    rollouts, signals = rollouts.rows(rows), signals.rows(rows)
    even = rollouts.replace(group_ids=torch.tensor([1, 1, 2, 2, 2, 2]))
    found = coefficients_of(make("canon", mu=0.5), even, signals)
    close(found, coefficients_of(make("dr-grpo").override(bounds={"high": 0.28}), even, signals))


@pytest.mark.parametrize("side", ["high", "low"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_alpha_on_either_side_follows_the_formula(side: str, alpha: float, size: int) -> None:
    g = torch.Generator().manual_seed(size)
    rewards, metric = torch.rand(size, generator=g).double(), torch.rand(size, generator=g).double()
    group = torch.zeros(size, dtype=torch.int64)
    for mu in (0.0, 0.4, 1.0):
        found = conditional(rewards, group, metric, mu, alpha, side)  # type: ignore[arg-type]
        close(found, literal(rewards.tolist(), metric.tolist(), mu, alpha, side))


def test_alpha_favors_the_side_it_multiplies() -> None:
    right = vector(1.0, 1.0, 1.0, 1.0)
    high = vector(0, 1, 0, 1).bool()
    for side in ("high", "low"):
        for alpha, sign in ((2.0, 1.0), (0.5, -1.0)):
            found = found_for(1.0, alpha, side, right)
            gap = found[high].mean() - found[~high].mean()
            assert float(gap) * sign * (1 if side == "high" else -1) > 0


def test_longer_rows_are_the_high_half() -> None:
    mask = torch.arange(4)[None] < torch.tensor([1, 4, 2, 3])[:, None]
    close(by_length(REWARDS, GROUP, mask)[:, 0], [0, 0.5, -1, 0.5])
    # Below 1, alpha takes from the long right answers.
    found = by_length(REWARDS, GROUP, mask, alpha=0.5)
    close(found[:, 0], [1 - 0.5, 0.5 - 0.5, 0 - 0.5, 0.5 - 0.5])
    assert bool((found[~mask] == 0).all())


def test_odd_groups_put_the_middle_row_into_the_high_half() -> None:
    high = upper_half(vector(3, 1, 2, 9, 8), torch.tensor([4, 4, 4, 7, 7]), torch.ones(5, dtype=torch.bool))
    assert high.tolist() == [True, False, True, True, False]


def test_ties_keep_the_order_of_the_rows() -> None:
    high = upper_half(torch.zeros(4), GROUP, torch.ones(4, dtype=torch.bool))
    assert high.tolist() == [False, False, True, True]
    constant = torch.zeros(4, 2).double()
    close(canon(REWARDS, GROUP, constant, ones(4, 2))[:, 0], [0.5, 0.5, -1.0, 0.0])
    close(canon(REWARDS, GROUP, constant, ones(4, 2), tie="none")[:, 0], [0.25, 0.25, -0.75, 0.25])
    split = METRIC[:, None].expand(4, 2)
    close(canon(REWARDS, GROUP, split, ones(4, 2), tie="none")[:, 0], [0, 0.5, -1, 0.5])


def test_a_single_row_gets_nothing() -> None:
    close(canon(vector(1.0), GROUP[:1], torch.ones(1, 2).double(), ones(1, 2), mu=0.3), 0.0)
    close(conditional(vector(1.0, NAN, NAN), GROUP[:3], vector(1, 2, 3), 1.0), 0.0)


def test_unscorable_rows_are_left_out_of_the_halves() -> None:
    rewards, metric = vector(1.0, NAN, 1.0, 0.0, 1.0), vector(0.1, 0.15, 0.4, 0.2, 0.3)
    found = conditional(rewards, torch.zeros(5, dtype=torch.int64), metric, 1.0)
    close(found, [0, 0, 0.5, -1, 0.5])


def test_equal_rewards_give_exactly_nothing() -> None:
    # In single precision the mean of three times 0.9 is not 0.9.
    rewards, metric = torch.full((12,), 0.9), torch.rand(12, generator=torch.Generator().manual_seed(0))
    for mu in (0.0, 0.5, 1.0):
        found = conditional(rewards, torch.tensor([0] * 7 + [1] * 5), metric, mu)
        assert bool((found == 0).all())


def test_metric_is_the_mean_over_sampled_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, True], [True, True, True]])
    entropies = torch.tensor([[0.1, 0.1, 99], [0.4, NAN, 99], [0.1, 99, 0.3], [0.9, 0.0, 0.0]]).double()
    close(canon(REWARDS, GROUP, entropies, mask)[:, 0], [0, 0.5, -1, 0.5])


@pytest.mark.parametrize("wrong", [{"mu": -0.1}, {"mu": 1.1}, {"alpha": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="canon needs"):
        by_length(REWARDS, GROUP, ones(4), **wrong)


# -- schedules of mu


def test_cosine_with_warm_up_and_restarts() -> None:
    for step in range(30):
        assert restarted_cosine(step, 0.6, 0.0) == pytest.approx(0.6 * (step + 1) / 30)
    for start in (30, 70, 110, 150, 190):
        for c in (0, 13, 39):
            wanted = 0.3 * (1 + math.cos(math.pi * c / 40))
            assert restarted_cosine(start + c, 0.6, 0.0) == pytest.approx(wanted)
    assert restarted_cosine(50, 1.0, 0.4) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="do not fit"):
        restarted_cosine(40, 0.6, 0.0, total=32)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.02), (29, 0.6), (30, 0.6), (50, 0.3)])
def test_inter_first_starts_between_the_halves(step: int, weight: float) -> None:
    entropies = METRIC[:, None]
    found = cosine(REWARDS, GROUP, entropies, ones(4), step)
    close(found, canon(REWARDS, GROUP, entropies, ones(4), mu=1 - weight))


@pytest.mark.parametrize(("step", "mu"), [(0, 1 / 30), (29, 1.0), (30, 1.0), (50, 0.7)])
def test_intra_first_starts_within_the_halves(step: int, mu: float) -> None:
    entropies = METRIC[:, None]
    found = cosine(REWARDS, GROUP, entropies, ones(4), step, first="intra")
    close(found, canon(REWARDS, GROUP, entropies, ones(4), mu=mu))


def test_annealed_mu_is_the_mean_reward_of_the_batch() -> None:
    rewards = vector(1.0, 1.0, 0.0, 1.0, 0.0, NAN, 1.0, 0.0)
    groups, entropies = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.cat([METRIC, METRIC])[:, None]
    found = annealed(rewards, groups, entropies, ones(8))
    close(found, canon(rewards, groups, entropies, ones(8), mu=4 / 7))
    for value, mu in ((3.0, 1.0), (-3.0, 0.0)):
        shifted = annealed(rewards + value, groups, entropies, ones(8))
        close(shifted, canon(rewards + value, groups, entropies, ones(8), mu=mu))
    assert annealed(rewards * NAN, groups, entropies, ones(8)).eq(0).all()


def test_random_halves_are_halves_and_differ_by_draw() -> None:
    groups = torch.arange(40) // 8
    rewards = (torch.arange(40) % 3 == 0).double()
    seen = set()
    for seed in range(5):
        found = at_random(rewards, groups, ones(40), torch.Generator().manual_seed(seed)).squeeze(-1)
        seen.add(tuple(found.tolist()))
        close(found.reshape(5, 8).sum(-1), 0.0)
        again = at_random(rewards, groups, ones(40), torch.Generator().manual_seed(seed)).squeeze(-1)
        assert torch.equal(found, again)
    assert len(seen) == 5


# -- the composition


@pytest.mark.parametrize("metric", ["entropy", "length", "random"])
def test_presets_by_metric(metric: str) -> None:
    rollouts, signals = synthetic_batch()
    name = {"entropy": "canon", "length": "canon/length", "random": "canon/random"}[metric]
    assert make("canon", metric=metric).advantage.part.name == name
    found = coefficients_of(make("canon", metric=metric), rollouts, signals)
    plain = coefficients_of(make("canon").override(advantage="dr-grpo/center"), rollouts, signals)
    assert not torch.allclose(found, plain)


def test_preset_schedules() -> None:
    rollouts, signals = synthetic_batch()
    first, last = (advantages_of(make("canon", schedule="inter-first"), rollouts, signals, step=s) for s in (0, 29))
    close(first, advantages_of(make("canon", mu=0.98), rollouts, signals))
    close(last, advantages_of(make("canon", mu=0.4), rollouts, signals))
    found = advantages_of(make("canon", schedule="intra-first"), rollouts, signals, step=0)
    close(found, advantages_of(make("canon", mu=1 / 30), rollouts, signals))
    rewards = rollouts.rewards
    assert rewards is not None
    found = advantages_of(make("canon", schedule="annealed"), rollouts, signals)
    close(found, advantages_of(make("canon", mu=float(rewards.nanmean())), rollouts, signals))
    for clash in ({"metric": "length"}, {"mu": 0.5}, {"alpha": 2.0}):
        with pytest.raises(ValueError, match="sets mu itself"):
            make("canon", schedule="annealed", **clash)


def test_coefficients_divide_by_rows_and_the_longest_response() -> None:
    rollouts = rollouts_of([1.0, 1.0, 0.0, 1.0], mask=[[1, 0], [1, 1], [1, 1], [1, 0]])
    signals = signals_of(rollouts, entropies=METRIC[:, None].expand(4, 2).clone())
    found = coefficients_of(make("canon"), rollouts, signals)
    close(found, rollouts.mask * torch.tensor([[0], [0.5], [-1], [0.5]]).double() / 8)
