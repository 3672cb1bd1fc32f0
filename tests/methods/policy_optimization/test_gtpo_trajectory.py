"""GTPO (trajectory-based): runs of conflict tokens, entropy penalty, entropy filter."""

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
from tokenloom.methods.policy_optimization.gtpo_trajectory import conflict_runs, entropy_filter, gtpo_trajectory

TOKENS = torch.tensor([[5, 7, 9, 2, 0], [5, 7, 8, 8, 2]])
MASK = torch.tensor([[True] * 4 + [False], [True] * 5])
GROUP = torch.zeros(2, dtype=torch.int64)


def weights(signs: Tensor, tokens: Tensor = TOKENS, mask: Tensor = MASK, group: Tensor = GROUP, **rest: bool) -> Tensor:
    """lambda: what advantages of +-1 become without a penalty, sign taken off (0 stays 0)."""
    base = torch.where(mask, signs[:, None], torch.zeros(mask.shape).double())
    found = gtpo_trajectory(base, signs, torch.zeros(mask.shape).double(), tokens, group, mask, penalty=0.0, **rest)
    return found * signs[:, None]


def test_defaults() -> None:
    assert defaults("gtpo-trajectory") == {"factor": 2.0, "penalty": 0.1, "divide_by_conflicts": False}
    assert defaults("gtpo-trajectory/entropy-filter") == {"threshold": math.log(2), "initial": None}
    assert preset_defaults("gtpo-trajectory") == {
        "dialect": "paper", "factor": 2.0, "penalty": 0.1, "std": False, "divide_by_conflicts": False,
    }  # fmt: skip
    assert make("gtpo-trajectory").terms == ()
    assert make("gtpo-trajectory", dialect="code").weight[0].params == {"threshold": 0.7, "initial": 0.0}


# -- conflict tokens


def test_worked_example() -> None:
    close(weights(vector(1, -1)), [[2, 2, 1, 2, 0], [0, 0, 1, 1, 0]])
    close(weights(vector(-1, 1)), [[0, 0, 1, 0, 0], [2, 2, 1, 1, 2]])


def by_loop(tokens: Tensor, signs: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """Position by position, in plain Python, for rows without holes."""
    lengths = mask.sum(-1).tolist()
    rows: list[list[int]] = [t[:n] for t, n in zip(tokens.tolist(), lengths, strict=True)]
    out = mask.double()
    for i, mine in enumerate(rows):
        if signs[i] == 0:
            continue
        for backward in (False, True):
            for t in range(len(mine)):
                at = len(mine) - 1 - t if backward else t
                holders = [
                    k
                    for k, other in enumerate(rows)
                    if group[k] == group[i] and t < len(other) and other[-1 - t if backward else t] == mine[at]
                ]
                if not (any(signs[k] > 0 for k in holders) and any(signs[k] < 0 for k in holders)):
                    break
                out[i, at] *= 2 if signs[i] > 0 else 0
    return out


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (14, 5), generator=g)
    mask = torch.arange(5)[None] < torch.randint(0, 6, (14, 1), generator=g)
    signs = torch.randint(-1, 2, (14,), generator=g).double()
    group = torch.randint(0, 3, (14,), generator=g)
    found = weights(signs, tokens, mask, group)
    wanted = by_loop(tokens, signs, group, mask)
    close(found, wanted * signs.abs()[:, None])


def test_a_group_of_one_sign_has_no_conflicts() -> None:
    close(weights(vector(1, 1)), MASK.double())
    close(weights(vector(-1, -1)), MASK.double())


def test_rows_without_advantage_are_ignored() -> None:
    tokens, mask = torch.tensor([[5, 7], [5, 7], [5, 6]]), ones(3, 2)
    forward, backward = conflict_runs(tokens, vector(1, 0, 1), torch.zeros(3, dtype=torch.int64), mask)
    assert not bool(forward.any() or backward.any())  # the only other holder of 5, 7 has no sign
    forward, _ = conflict_runs(tokens, vector(1, 0, -1), torch.zeros(3, dtype=torch.int64), mask)
    assert forward.tolist() == [[True, False], [False, False], [True, False]]


def test_identical_rows_get_four_and_zero() -> None:
    close(weights(vector(1, -1), torch.tensor([[3, 4]] * 2), ones(2, 2)), [[4, 4], [0, 0]])


def test_padding_and_other_groups_never_conflict() -> None:
    mask = torch.tensor([[True, False], [True, False]])
    close(weights(vector(1, -1), torch.tensor([[3, 0], [4, 0]]), mask), mask.double())
    close(weights(vector(1, -1), torch.tensor([[3, 4]] * 2), ones(2, 2), torch.tensor([0, 1])), ones(2, 2).double())


def test_tool_output_ends_a_run() -> None:
    tokens, mask = torch.tensor([[3, 4, 5, 6]] * 2), torch.tensor([[True, True, False, True]] * 2)
    close(weights(vector(1, -1), tokens, mask), [[2, 2, 0, 2], [0, 0, 0, 0]])


def test_dividing_by_the_conflicts_of_the_row() -> None:
    found = weights(vector(1, -1), divide_by_conflicts=True)
    close(found, torch.tensor([[2, 2, 1, 2, 0], [0, 0, 1, 1, 0]]).double() / 3)
    close(weights(vector(1, 1), divide_by_conflicts=True), MASK.double())


# -- entropy


def test_penalty_enters_before_lambda_with_the_signs_from_before() -> None:
    # A = +-0.05 and <H> = 1: the penalty turns row 0 negative, its conflicts still count double.
    base = torch.where(MASK, vector(0.05, -0.05)[:, None], torch.zeros(2, 5).double())
    entropies = torch.where(MASK, torch.ones(2, 5).double(), torch.full((2, 5), NAN).double())
    found = gtpo_trajectory(base, vector(1, 0), entropies, TOKENS, GROUP, MASK)
    close(found, torch.tensor([[2, 2, 1, 2, 0], [0, 0, 1, 1, 0]]) * vector(-0.05, -0.15)[:, None])
    unscored = gtpo_trajectory(base * 0, vector(NAN, 0), entropies, TOKENS, GROUP, MASK)
    close(unscored[0], 0.0)


def test_filter_drops_confused_rows_of_an_initially_certain_policy() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    calm = torch.tensor([[0.1, 0.1], [0.2, NAN], [0.1, 0.3]], dtype=torch.float64)
    kept, state = entropy_filter(calm, mask, None)
    close(kept, mask.double())
    assert state == {"initial": pytest.approx((0.1 + 0.2 + 0.2) / 3)}
    later = torch.tensor([[0.6, 0.8], [0.69, 9.0], [0.6, 0.79]], dtype=torch.float64)  # means 0.7, 0.69, 0.695
    kept, again = entropy_filter(later, mask, state)
    close(kept, [[0, 0], [1, 0], [0, 0]])
    assert again == state
    close(entropy_filter(later, mask, None, threshold=0.7, initial=0.0)[0], mask.double())  # the code's 0.7


def test_filter_is_off_for_an_initially_undecided_policy() -> None:
    entropies = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    kept, state = entropy_filter(entropies, ones(2), None)
    close(kept, 1.0)
    assert state == {"initial": 1.25}
    kept, state = entropy_filter(entropies, torch.zeros(2, 1, dtype=torch.bool), None)
    close(kept, 0.0)
    assert state is None  # nothing was measured yet


def test_a_dropped_row_has_no_gradient_and_still_counts_in_the_mean() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0], mask=[[1, 1], [1, 1], [1, 0]])
    rollouts = rollouts.replace(tokens=torch.tensor([[1, 2], [3, 4], [5, 0]]))
    signals = signals_of(rollouts, entropies=torch.tensor([[0.2, 0.2], [0.9, 0.9], [0.1, 0.0]]).double())
    found = coefficients_of(make("gtpo-trajectory"), rollouts, signals)  # mean entropy 0.4 < ln 2
    a = [2 / 3 - 0.02, 0.0, -1 / 3 - 0.01]
    close(found, [[a[0] / 6, a[0] / 6], [0, 0], [a[2] / 3, 0]])


def test_the_initial_entropy_is_carried_from_step_to_step() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1], [1]])
    algorithm = make("gtpo-trajectory")
    first = algorithm.plan(rollouts, signals_of(rollouts, entropies=torch.full((2, 1), 0.1).double()))
    wild = signals_of(rollouts, entropies=torch.full((2, 1), 2.0).double())
    close(algorithm.plan(rollouts, wild, first.state, step=1).values["weights"], 0.0)
    close(algorithm.plan(rollouts, wild).values["weights"], 1.0)


# -- the whole


def test_without_penalty_and_conflicts_it_is_reinforce_with_a_sequence_mean() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1], [1, 0]]).replace(tokens=torch.tensor([[1, 2], [3, 0]]))
    signals = signals_of(rollouts, 0.3, entropies=torch.full((2, 2), 0.2).double())
    found = coefficients_of(make("gtpo-trajectory", penalty=0.0), rollouts, signals)
    close(found, [[1 / 8, 1 / 8], [-1 / 4, 0]])  # off policy all the same: there is no ratio


def test_a_constant_group_moves_nothing_without_penalty() -> None:
    rollouts = rollouts_of([0.1] * 3, mask=[[1, 1]] * 3)
    signals = signals_of(rollouts, entropies=torch.full((3, 2), 0.2).double())
    assert bool((coefficients_of(make("gtpo-trajectory", penalty=0.0), rollouts, signals) == 0).all())
    close(coefficients_of(make("gtpo-trajectory"), rollouts, signals), -0.1 * 0.2 / 6)


def test_normalized_advantages_are_a_flag() -> None:
    rollouts, signals = synthetic_batch()
    plain = make("gtpo-trajectory", penalty=0.0).override(credit=None, weight=None)
    normalized = make("gtpo-trajectory", penalty=0.0, std=True).override(credit=None, weight=None)
    close(advantages_of(normalized, rollouts, signals), advantages_of(make("grpo"), rollouts, signals))
    close(advantages_of(plain, rollouts, signals), advantages_of(make("dr-grpo"), rollouts, signals))


@pytest.mark.parametrize("without", [{"credit": None}, {"credit": {"gtpo-trajectory": {"penalty": 0.0}}}])
def test_mechanism_shows_on_the_batch(without: dict[str, object]) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("gtpo-trajectory")
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(**without)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)
