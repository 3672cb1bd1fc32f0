"""GTPO and GRPO-S: rewards shared out by entropy, then normalized by side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    gradient,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.gspo import gspo
from tokenloom.methods.policy_optimization.gtpo_entropy import (
    entropy_row_rewards,
    entropy_token_rewards,
    gtpo_entropy,
    mean_ratio,
)

ENTROPIES = torch.tensor([[3.0, 1], [1, 3], [4, 1], [1, 4]], dtype=torch.float64)
OUTCOMES = vector(1, 1, 0, 0)
GROUP = torch.zeros(4, dtype=torch.int64)
SHAPED = [[1.15, 1.05], [1.05, 1.15], [-1.04, -1.16], [-1.16, -1.04]]
SETTINGS = {"outcome": 1.0, "bonus": 0.1, "threshold": 0.5, "eps": 1e-8}


def test_defaults() -> None:
    assert defaults("gtpo-entropy/token-rewards") == SETTINGS
    assert defaults("gtpo-entropy/row-rewards") == SETTINGS
    assert defaults("gtpo-entropy") == {"per": "token", "population": "all", "one_sided": False, "eps": 1e-8}
    assert preset_defaults("gtpo-entropy") == {
        "variant": "gtpo", "population": "all", "outcome": 1.0, "bonus": 0.1, "low": 0.2, "high": 0.2,
    }  # fmt: skip
    assert make("gtpo-entropy").aggregate.part.name == "token-mean"
    assert make("gtpo-entropy", variant="grpo-s").aggregate.part.name == "sequence-mean"


# -- token rewards


def test_worked_numbers() -> None:
    # 1 / (H + 1e-8) moves the wrong side by 1e-9.
    close(entropy_token_rewards(OUTCOMES, ENTROPIES, GROUP, ones(4, 2)), SHAPED, 1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_sums_position_by_position(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(12, 5, generator=g) > 0.3
    entropies = torch.rand(12, 5, generator=g).double() + 0.1
    rewards = (torch.rand(12, generator=g) > 0.5).double()
    groups = torch.randint(0, 2, (12,), generator=g)
    found = entropy_token_rewards(rewards, entropies, groups, mask, outcome=0.7, bonus=0.3, eps=0.0)
    for i in range(12):
        for t in range(5):
            peers = [k for k in range(12) if groups[k] == groups[i] and bool(mask[k, t]) and rewards[k] == rewards[i]]
            h = [float(entropies[k, t]) for k in peers]
            here = float(entropies[i, t])
            if not mask[i, t]:
                expected = 0.0
            elif rewards[i] > 0.5:
                expected = 0.7 + 0.3 * here / sum(h) * len(peers)
            else:
                expected = -0.7 - 0.3 * (1 / here) / sum(1 / x for x in h) * len(peers)
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-12)


def test_right_rewards_of_a_position_are_conserved() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    entropies = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).double()
    for outcome, bonus in ((0.9, 0.1), (1.0, 0.1)):
        found = entropy_token_rewards(OUTCOMES, entropies, GROUP, mask, outcome=outcome, bonus=bonus)
        close(found[:2].sum(0), (outcome + bonus) * vector(2, 2, 1))
        close(found[2:].sum(0), -(outcome + bonus) * vector(2, 1, 1))


def test_a_single_row_of_a_side_has_the_whole_share() -> None:
    found = entropy_token_rewards(vector(1, 0), torch.tensor([[9.0], [0.01]]).double(), GROUP[:2], ones(2))
    close(found, [[1.1], [-1.1]])


def test_certain_right_tokens_share_equally() -> None:
    found = entropy_token_rewards(OUTCOMES, torch.zeros(4, 2).double(), GROUP, ones(4, 2))
    close(found, vector(1.1, 1.1, -1.1, -1.1)[:, None])


def test_one_side_alone_is_shaped_alone() -> None:
    found = entropy_token_rewards(vector(1, 1), ENTROPIES[:2], GROUP[:2], ones(2, 2))
    close(found, SHAPED[:2])


def test_unscorable_rows_share_nothing() -> None:
    rewards, entropies = vector(1, 1, 0, 0, NAN), torch.cat([ENTROPIES, row(50.0, 50.0)])
    found = entropy_token_rewards(rewards, entropies, torch.zeros(5, dtype=torch.int64), ones(5, 2))
    close(found[:4], SHAPED, 1e-8)
    assert bool(found[4].isnan().all())


# -- advantages


def test_advantages_with_the_other_side_as_zeros() -> None:
    # Mean .55, variance .30375; wrong side: mean -.55, variance (2 * 1.04^2 + 2 * 1.16^2) / 8 - .3025 = .3043.
    shaped = torch.tensor(SHAPED, dtype=torch.float64)
    found = gtpo_entropy(shaped.sum(-1), shaped, GROUP, ones(4, 2))
    std = math.sqrt(0.3043)
    wrong = [[-0.49 / std, -0.61 / std], [-0.61 / std, -0.49 / std]]
    close(found, [[1.0886621, 0.9072184], [0.9072184, 1.0886621], *wrong], 1e-6)
    close(found[0], [1.089, 0.907], 5e-4)  # the sheet's digits


def test_own_population_is_centered_on_each_side() -> None:
    shaped = torch.tensor(SHAPED, dtype=torch.float64)
    found = gtpo_entropy(shaped.sum(-1), shaped, GROUP, ones(4, 2), population="own", eps=0.0)
    close(found, [[1, -1], [-1, 1], [1, -1], [-1, 1]])


@pytest.mark.parametrize("variant", ["gtpo", "grpo-s"])
@pytest.mark.parametrize("right", [1, 3, 6])
def test_equal_entropies_and_lengths_are_grpo_with_the_population_std(variant: str, right: int) -> None:
    rollouts = rollouts_of([1.0] * right + [0.0] * (8 - right), mask=[[1, 1, 1]] * 8)
    signals = signals_of(rollouts, entropies=torch.full((8, 3), 0.7).double())
    found = advantages_of(make("gtpo-entropy", variant=variant), rollouts, signals)
    base = make("grpo", kl_coef=0.0).override(advantage={"correction": 0, "eps": 0.0})
    # sqrt(variance + 1e-8) against sqrt(variance), variance at least 0.13.
    close(found, advantages_of(base, rollouts, signals), 1e-6)


def test_a_group_with_one_side_moves_nothing_unless_asked() -> None:
    shaped = torch.tensor(SHAPED, dtype=torch.float64)[:2]
    assert bool((gtpo_entropy(shaped.sum(-1), shaped, GROUP[:2], ones(2, 2)) == 0).all())
    close(gtpo_entropy(shaped.sum(-1), shaped, GROUP[:2], ones(2, 2), one_sided=True, eps=0.0), [[1, -1], [-1, 1]])


def test_groups_do_not_mix_and_unscorable_rows_get_nothing() -> None:
    shaped = torch.tensor([*SHAPED, [NAN, NAN], [1.1, 1.1], [-1.1, -1.1]], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    found = gtpo_entropy(shaped.sum(-1), shaped, group, ones(7, 2))
    close(found[:4], gtpo_entropy(shaped[:4].sum(-1), shaped[:4], GROUP, ones(4, 2)))
    close(found[4], 0.0)
    close(found[5:], [[1, 1], [-1, -1]], 1e-7)


# -- GRPO-S


def test_row_rewards_worked_numbers() -> None:
    # Mean entropies 3, 1 and 4, 1.
    entropies = torch.tensor([[5.0, 1], [1, 1], [4, 4], [1, 1]], dtype=torch.float64)
    found = entropy_row_rewards(OUTCOMES, entropies, GROUP, ones(4, 2))
    close(found, [1.15, 1.05, -1.04, -1.16], 1e-8)
    advantages = gtpo_entropy(found, torch.zeros(4, 2).double(), GROUP, ones(4, 2), per="row")
    # Population (1.15, 1.05, 0, 0): mean .55, variance .30375 as before, whatever the lengths.
    close(advantages[:2], [[1.0886621] * 2, [0.9072184] * 2], 1e-6)
    ragged = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    close(gtpo_entropy(found, torch.zeros(4, 2).double(), GROUP, ragged, per="row")[:, 0], advantages[:, 0])


def test_row_rewards_without_tokens_or_score() -> None:
    mask = torch.tensor([[True], [True], [False], [False], [True], [True]])
    rewards = vector(1, 1, 1, 0, NAN, 0)
    found = entropy_row_rewards(rewards, vector(3, 1, 9, 9, 9, 2)[:, None], torch.zeros(6, dtype=torch.int64), mask)
    close(found[[0, 1, 2, 3, 5]], [1.15, 1.05, 1.0, -1.0, -1.1], 1e-8)
    assert bool(found[4].isnan())


def test_mean_ratio_worked_numbers() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [False] * 3])
    ratios = torch.tensor([[1.5, 0.7, 9.0], [1.0, 2.0, 3.0], [5.0] * 3], dtype=torch.float64)
    found = mean_ratio(ratios.log(), torch.zeros(3, 3).double(), mask)
    close(found.exp(), [[1.1, 1.1, 1], [2, 2, 2], [1, 1, 1]])
    assert bool((found[~mask] == 0).all())
    (slope,) = gradient(lambda lp: mean_ratio(lp, torch.zeros(3, 3).double(), mask), ratios.log())
    assert bool((slope[~mask] == 0).all())  # the row without tokens included


def test_mean_ratio_gradient() -> None:
    # s = mean r, so d log s / d logprob_t = r_t / sum r; three entries carry it.
    ratios = row(1.0, 2.0, 3.0)
    (slope,) = gradient(lambda lp: mean_ratio(lp, torch.zeros(1, 3).double(), ones(1, 3)), ratios.log())
    close(slope, 3 * ratios / 6)
    # On policy it is the sequence ratio's gradient.
    same = row(-1.0, -2.0, -0.5)
    one, two = (gradient(lambda lp, f=f: f(lp, same, ones(1, 3)), same)[0] for f in (mean_ratio, gspo))
    close(one, two)


def test_the_row_ratio_is_clipped_as_a_whole() -> None:
    # Row 0: mean ratio 1.3 > 1.2 at A > 0 loses every token; row 1: mean 0.75 at A < 0 too.
    rollouts = rollouts_of([1.0, 0.0, 1.0, 0.0], mask=[[1, 1]] * 4)
    ratio = torch.tensor([[1.0, 1.6], [0.5, 1.0], [1.0, 1.2], [1.0, 0.8]], dtype=torch.float64)
    entropies = torch.ones(4, 2).double()
    found = coefficients_of(
        make("gtpo-entropy", variant="grpo-s"), rollouts, signals_of(rollouts, ratio.log(), entropies=entropies)
    )
    # s A / (4 rows) * r_t / sum r, with A = +-1 to 1e-7.
    close(found, [[0, 0], [0, 0], [1 / 8, 1.2 / 8], [-1 / 8, -0.8 / 8]], 1e-6)


# -- the whole


@pytest.mark.parametrize("variant", ["gtpo", "grpo-s"])
def test_entropy_carries_no_gradient_and_shows_on_the_batch(variant: str) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("gtpo-entropy", variant=variant)
    assert "entropies" not in algorithm.loss_needs
    found, flat = (
        coefficients_of(make("gtpo-entropy", variant=variant, bonus=b), rollouts, signals) for b in (0.1, 0.0)
    )
    assert not torch.allclose(found, flat, rtol=1e-6, atol=1e-9)


def test_the_loss_divides_by_the_tokens() -> None:
    rollouts = rollouts_of(OUTCOMES.tolist(), mask=[[1, 1], [1, 1], [1, 1], [1, 0]])
    signals = signals_of(rollouts, entropies=ENTROPIES)
    plan = make("gtpo-entropy").plan(rollouts, signals)
    close(plan.values["scale"], rollouts.mask.double() / 7)


@pytest.mark.parametrize("shaper", [entropy_token_rewards, entropy_row_rewards])
def test_entropies_are_detached(shaper: Any) -> None:
    live: Tensor = ENTROPIES.clone().requires_grad_()
    assert not shaper(OUTCOMES, live, GROUP, ones(4, 2)).requires_grad
