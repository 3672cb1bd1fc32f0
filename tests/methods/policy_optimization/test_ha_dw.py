"""HA-DW: advantages weighted by how hard a prompt is for the model as it is."""

from __future__ import annotations

import json
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
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.ha_dw import baseline_bias, conditional_mean, ha_dw, updated_belief

STATE = {"history": [0.5]}
"""One belief of one half."""


def weighted(
    outcomes: Tensor, advantages: Tensor, groups: list[int], state: dict[str, Any] | None = None, **settings: Any
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Advantages [B], metrics, new state."""
    made, new = ha_dw(advantages[:, None], outcomes, torch.tensor(groups), ones(len(outcomes)), state, **settings)
    return made["advantages"].squeeze(-1), made["metrics"], new


def test_defaults() -> None:
    expected = {"scale": 1.3, "anchor": "belief", "window": 50, "eta": 0.1, "floor": 0.1}
    assert defaults("ha-dw") == expected
    assert preset_defaults("ha-dw") == {"base": "grpo", "dialect": "paper"}
    code = {"anchor": "window", "window": 10, "scale": 1.5}
    assert make("ha-dw", dialect="code").credit[0].params == code
    for base in ("gspo", "dapo"):
        assert make("ha-dw", base=base).override(credit=None).recipe() == make(base).recipe()


# -- theory


def enumerated_mean(p: float, size: int) -> float:
    """E[R / G | 1 <= R <= G - 1] by summing over R."""
    weights = [math.comb(size, r) * p**r * (1 - p) ** (size - r) for r in range(size + 1)]
    kept = range(1, size)
    return sum(weights[r] * r / size for r in kept) / sum(weights[r] for r in kept)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.8])
def test_conditional_mean_is_the_enumerated_one(p: float, size: int) -> None:
    close(conditional_mean(vector(p), size), enumerated_mean(p, size))
    closed = p * (1 - p) ** size + p ** (size + 1) - p**size
    close(baseline_bias(vector(p), size), closed / (1 - (1 - p) ** size - p**size))


def test_worked_bias() -> None:
    close(conditional_mean(vector(0.25), 4), 0.362069, 1e-6)
    close(baseline_bias(vector(0.25), 4), 0.112069, 1e-6)


def test_bias_is_antisymmetric_and_vanishes_at_one_half() -> None:
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    close(baseline_bias(p, 6), -baseline_bias(1 - p, 6))
    close(baseline_bias(vector(0.5), 8), 0.0)
    assert bool((baseline_bias(p[p < 0.49], 6) > 0).all())


# -- weights


def test_worked_weights() -> None:
    outcomes, a = vector(1, 0, 0, 0), vector(1.5, -0.5, -0.5, -0.5)
    found, metrics, _ = weighted(outcomes, a, [0] * 4, STATE, scale=1.0)
    close(found[0] / a[0], 1.284025, 1e-6)
    close(found[1] / a[1], 0.778801, 1e-6)
    assert metrics["anchor"] == 0.5
    scaled, _, _ = weighted(outcomes, a, [0] * 4, STATE, scale=1.7)
    close((scaled[0] / a[0]) * (scaled[1] / a[1]), 1.7**2)


def test_easy_prompts_are_weighted_the_other_way() -> None:
    outcomes, a = vector(1, 1, 1, 0), vector(0.5, 0.5, 0.5, -1.5)
    found, _, _ = weighted(outcomes, a, [0] * 4, STATE, scale=1.0)
    close(found / a, [0.778801] * 3 + [1.284025], 1e-6)


def test_no_difference_and_no_scale_change_nothing() -> None:
    outcomes, a = vector(1, 0, 1, 0), vector(0.87, -0.87, 0.87, -0.87)
    found, _, _ = weighted(outcomes, a, [0, 0, 1, 1], STATE, scale=1.0)
    assert torch.equal(found, a)
    # A single kind of prompt in the first batch is its own anchor.
    found, _, _ = weighted(outcomes, a, [0, 0, 1, 1], None, scale=1.0)
    assert torch.equal(found, a)


def test_zero_advantages_stay_zero_and_signs_never_change() -> None:
    rollouts, signals = synthetic_batch()
    base, found = (advantages_of(make(s), rollouts, signals) for s in ("grpo", "ha-dw"))
    assert torch.equal(base.sign(), found.sign())
    assert not torch.allclose(base * 1.3, found)


def test_every_token_by_its_own_sign() -> None:
    a = torch.tensor([[1.0, -1.0, 0.0, NAN], [-1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    made, _ = ha_dw(a, vector(0.0, 0.5), torch.tensor([3, 3]), mask, STATE, scale=1.0)
    up, down = math.exp(0.25), math.exp(-0.25)
    close(made["advantages"], [[up, -down, 0, 0], [-down, -down, 0, 0]])


# -- the anchor


def test_worked_update() -> None:
    assert updated_belief(0.5, 0.7, sigma=0.2, eta=0.1) == pytest.approx(0.504, abs=1e-12)
    assert updated_belief(0.5, 0.7, sigma=2.0, eta=9.0) == pytest.approx(0.7)


def test_prompts_are_compared_with_the_belief_before_the_update() -> None:
    outcomes, a = vector(1, 1, 0, 0, 0, 0, 0, 0), vector(1, 1, -1, -1, 0, 0, 0, 0)
    history = [0.3, 0.7]
    found, metrics, state = weighted(outcomes, a, [0, 0, 0, 0, 1, 1, 1, 1], {"history": history}, scale=1.0)
    assert metrics["anchor"] == 0.7
    close(found[:4], [math.exp(0.2)] * 2 + [-math.exp(-0.2)] * 2)
    # Standard deviation of .3 and .7 is .2; the batch's accuracy is a quarter.
    assert state["history"] == pytest.approx([0.3, 0.7, 0.98 * 0.7 + 0.02 * 0.25])
    assert history == [0.3, 0.7]


def test_first_steps() -> None:
    a, groups = vector(1, -1), [0, 0]
    _, metrics, state = weighted(vector(1, 0.5), a, groups)
    assert metrics["anchor"] == pytest.approx(0.75)
    assert state["history"] == pytest.approx([0.75])
    # With one belief sigma counts as 1.
    _, metrics, state = weighted(vector(0, 0.5), a, groups, state)
    assert metrics["anchor"] == pytest.approx(0.75)
    assert state["history"] == pytest.approx([0.75, 0.9 * 0.75 + 0.1 * 0.25])


def test_window_forgets_the_oldest() -> None:
    _, _, state = weighted(vector(1, 0), vector(1, -1), [0, 0], {"history": [0.1, 0.2, 0.3]}, window=3)
    assert len(state["history"]) == 3
    assert state["history"][:2] == [0.2, 0.3]


def test_floor_keeps_a_settled_anchor_moving() -> None:
    for floor, moved in ((0.0, 0.0), (0.1, 0.004), (0.5, 0.02)):
        _, _, state = weighted(vector(1, 0.8), vector(1, -1), [0, 0], {"history": [0.5] * 9}, floor=floor)
        assert state["history"][-1] - 0.5 == pytest.approx(moved)


def test_released_anchor_is_the_mean_of_recent_batches_with_the_present_one() -> None:
    settings = {"anchor": "window", "window": 3, "scale": 1.0}
    state: dict[str, Any] | None = None
    seen = []
    for accuracy in (0.5, 1.0, 0.0, 0.25):
        outcomes = torch.full((4,), accuracy, dtype=torch.float64)
        _, metrics, state = weighted(outcomes, vector(1, -1, 1, -1), [0, 0, 1, 1], state, **settings)
        seen.append(metrics["anchor"])
    assert seen == pytest.approx([0.5, 0.75, 0.5, 1.25 / 3])
    assert state == {"history": [1.0, 0.0, 0.25]}


@pytest.mark.parametrize("anchor", ["belief", "window"])
def test_a_batch_without_outcomes_changes_nothing(anchor: str) -> None:
    a = vector(0, 0)
    for history, level in (([], 0.0), ([0.2, 0.6], 0.6 if anchor == "belief" else 0.4)):
        found, metrics, state = weighted(vector(NAN, NAN), a, [0, 0], {"history": history}, anchor=anchor)
        assert torch.equal(found, a)
        assert metrics == {"anchor": pytest.approx(level), "bias": 0.0}
        assert state == {"history": history}


def test_unscorable_rows_are_left_out() -> None:
    found, metrics, _ = weighted(vector(1, NAN, 0, 0, 0), vector(3, 0, -1, -1, -1), [5] * 5, STATE, scale=1.0)
    close(found, [3 * 1.284025, 0, *[-0.778801] * 3], 1e-6)
    assert metrics["bias"] == pytest.approx(0.112069, abs=1e-6)


def test_bias_metric_averages_over_mixed_groups() -> None:
    outcomes = vector(1, 0, 0, 0, 1, 1, 1, 1, 1, 0)
    _, metrics, _ = weighted(outcomes, outcomes - 0.5, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2], STATE)
    # Group 0 has bias .112069, group 1 is not mixed, group 2 stands at one half.
    assert metrics["bias"] == pytest.approx(0.112069 / 2, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"window": 0}, {"eta": -0.1}, {"floor": -0.1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ha-dw needs"):
        weighted(vector(1.0), vector(1.0), [0], **wrong)


# -- the composition


def test_state_is_carried_and_can_be_written_down() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("ha-dw")
    one = algorithm.plan(rollouts, signals)
    two = algorithm.plan(rollouts, signals, one.state)
    assert len(two.state["credit/0/ha-dw"]["history"]) == 2
    assert json.loads(json.dumps(two.state)) == two.state
    assert rollouts.rewards is not None
    accuracy = float(rollouts.rewards.nanmean())
    assert one.metrics["ha-dw/anchor"] == pytest.approx(accuracy)
    assert one.metrics["ha-dw/bias"] > 0


def test_gathered_order_does_not_move_the_anchor() -> None:
    rollouts, signals = synthetic_batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    state = {"credit/0/ha-dw": {"history": [0.2, 0.9]}}
    one = make("ha-dw").plan(rollouts, signals, state)
    two = make("ha-dw").plan(rollouts.rows(order), signals.rows(order), state)
    close(one.values["advantages"][order], two.values["advantages"])
    assert one.state["credit/0/ha-dw"]["history"] == pytest.approx(two.state["credit/0/ha-dw"]["history"])


@pytest.mark.parametrize("base", ["grpo", "gspo", "dapo"])
def test_multiplies_the_objective_of_any_base(base: str) -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0], mask=[[1, 1]] * 4)
    signals = signals_of(rollouts, 1e-4)
    state = {"credit/0/ha-dw": {"history": [0.5]}}
    algorithm = make("ha-dw", base=base)
    found = coefficients_of(algorithm, rollouts, signals, state=state)
    plain = coefficients_of(algorithm.override(credit=None), rollouts, signals)
    close(found, plain * 1.3 * torch.tensor([[math.exp(0.25)], *[[math.exp(-0.25)]] * 3]).double(), 1e-6)
