"""vapo-limits, bro-rl, rlvr-two-stage: their identities, and that a run can log them."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from methods.policy_optimization.batch import NAN, close, make, ones, row, synthetic_batch, vector
from tokenloom.catalog import methods
from tokenloom.methods.policy_optimization.bro_rl import chance_of_decline, mass_balance, seen_mass
from tokenloom.methods.policy_optimization.rlvr_two_stage import bandit_flow, coverage, negative_only, pass_at_k
from tokenloom.methods.policy_optimization.vapo_limits import (
    critic,
    entropy_by_position,
    explained_variance,
    lambdas,
    position_deciles,
    small_advantages,
)


def test_they_are_registered_as_metrics_without_a_preset() -> None:
    for slug in ("vapo-limits", "bro-rl", "rlvr-two-stage"):
        assert "metric" in methods()[slug].stages
        assert methods()[slug].preset is None


def test_a_plan_logs_them() -> None:
    rollouts, signals = synthetic_batch()
    metric = ["bro-rl", "rlvr-two-stage", "vapo-limits/lambda", "vapo-limits/advantage", "vapo-limits/entropy",
              "vapo-limits/critic"]  # fmt: skip
    algorithm = make("ppo-gae").override(metrics=metric)
    found = algorithm.plan(rollouts, signals).metrics
    assert 0 < found["bro-rl/mass"] <= 1
    assert found["rlvr-two-stage/pass@1"] <= found["rlvr-two-stage/pass@2"]
    assert {"vapo-limits/critic/explained", "vapo-limits/critic/bias/0", "vapo-limits/entropy/mean"} <= found.keys()
    assert "entropies" in algorithm.needs
    with pytest.raises(ValueError, match="needs 'returns'"):
        make("grpo").override(metrics=["vapo-limits/critic"])


# -- vapo-limits


def test_deciles_count_sampled_tokens_only() -> None:
    mask = torch.tensor([[True] * 4 + [False, True], [True, False, False, False, False, False]])
    assert position_deciles(mask)[mask].tolist() == [0, 2, 4, 6, 8, 0]


def test_explained_variance() -> None:
    returns = vector(1, 0, 1, 0)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full_like(returns, 7), returns) == 0
    assert float(explained_variance(-returns, returns) or 0) == pytest.approx(1 - 4)
    assert explained_variance(returns, torch.ones(4)) is None
    found = critic(row(1, 1, 0, 0), row(1, 0, 1, 0), ones(1, 4))
    close(found["explained"], 1 - 0.5 / 0.25)
    assert [float(found[f"bias/{d}"]) for d in (0, 2, 5, 7)] == [0, 1, -1, 0]


def test_other_diagnostics() -> None:
    mask = torch.arange(40)[None] < torch.tensor([[40], [10], [0]])
    found = lambdas(mask)
    close(found["mean"], 0.25)
    assert (float(found["lowest"]), float(found["highest"])) == (0.0, 0.5)
    assert float(small_advantages(row(0.001, -0.5, 0.0, 1), ones(1, 4))["small"]) == 0.5
    h = entropy_by_position(row(1, 2, 3, 4), ones(1, 4))
    assert {k: float(v) for k, v in h.items()} == {"mean": 2.5, "0": 1, "2": 2, "5": 3, "7": 4}


# -- bro-rl


def test_mass_balance_is_the_derivative_of_the_right_mass() -> None:
    g = torch.Generator().manual_seed(0)
    for trial in range(50):
        logits = torch.randn(12, generator=g, dtype=torch.float64)
        p = logits.softmax(-1)
        correct = torch.rand(12, generator=g) < 0.4
        sampled = torch.rand(12, generator=g) < 0.5
        reward = torch.where(sampled, torch.where(correct, 1.0, -0.7), 0.0).double()
        eta, n = 1e-5, 3
        step = eta / n * p * (reward - (p * reward).sum())
        moved = ((logits + step).softmax(-1) - (logits - step).softmax(-1))[correct].sum() / 2
        found = mass_balance(p, correct, sampled, right=1.0, wrong=-0.7, rate=eta, samples=n)
        # Central differences err by eta^2 relative to the slope.
        assert float(found["total"]) == pytest.approx(float(moved), rel=1e-6, abs=1e-16), trial
        assert float(found["sampled_right"]) >= 0
        assert float(found["sampled_wrong"]) >= 0
        whole = mass_balance(p, correct, torch.ones(12, dtype=torch.bool))
        assert float(whole["unsampled"]) == 0
        assert float(whole["total"]) >= 0


def test_more_rollouts_decline_less_often() -> None:
    rates = [chance_of_decline(n, generator=torch.Generator().manual_seed(1)) for n in (1, 16, 128, 1024)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 10 * max(rates[-1], 1e-3)
    assert rates[-1] < 0.01
    with pytest.raises(ValueError, match="right >= 0 >= wrong"):
        mass_balance(torch.ones(1), torch.ones(1).bool(), torch.ones(1).bool(), right=-1.0)


def test_seen_mass_counts_a_response_once() -> None:
    logprobs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.25, 1.0], [1.0, 1.0]]).log()
    tokens = torch.tensor([[1, 2], [1, 2], [3, 9], [4, 4]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    found = seen_mass(logprobs, tokens, mask, torch.tensor([0, 0, 0, 1]))
    assert float(found["mass"]) == pytest.approx(0.5)
    assert float(found["repeat"]) == pytest.approx(2 / 16)


# -- rlvr-two-stage


def test_the_best_arm_falls_first_and_wins_late() -> None:
    flow = bandit_flow(vector(0.5, 0.49, 0.01), vector(0.8, 0.2, 1.0), steps=20000)
    p = flow.probabilities
    close(p.sum(-1), 1.0)
    assert 0.0008 < float(p[:, 2].min()) < 0.0015
    peak = int(p[:, 0].argmax())
    assert peak == pytest.approx(2339, abs=2)
    assert float(p[peak, 0]) == pytest.approx(0.9985, abs=1e-4)
    half = int((p[:, 2] > 0.5).nonzero()[0])
    assert half == pytest.approx(5840, abs=2)
    assert flow.overtakes == pytest.approx(half, abs=2)
    assert float(p[-1, 2]) >= 0.999


def test_equal_rewards_are_stationary() -> None:
    start = vector(0.6, 0.3, 0.1)
    flow = bandit_flow(start, vector(0.3, 0.3, 0.3), steps=50)
    close(flow.probabilities, start.expand(51, 3))
    with pytest.raises(ValueError, match="sum to 1"):
        bandit_flow(vector(0.6, 0.3), vector(1, 0))


def test_negative_only_keeps_more_of_what_was_not_tried() -> None:
    start, values = vector(0.6, 0.2, 0.15, 0.05), vector(0.5, 0.5, 0.1, 0.5)

    def entropy(mode: str) -> float:
        flow = bandit_flow(start, values, rate=0.5, steps=300, group=8, mode=mode,  # type: ignore[arg-type]
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
        p = flow.probabilities[-1]
        return float(-(p * p.clamp(min=1e-300).log()).sum())

    assert entropy("negative-only") > entropy("both")
    assert negative_only(row(1, -2, 0), ones(1, 3)).tolist() == [[0, -2, 0]]


def test_pass_at_k_is_the_mean_over_all_choices() -> None:
    outcomes = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        wanted = [any(c) for c in combinations(outcomes, k)]
        assert pass_at_k(2, 6, k) == pytest.approx(sum(wanted) / math.comb(6, k))
    with pytest.raises(ValueError, match=r"1\.\.6"):
        pass_at_k(2, 6, 7)
    found = coverage(vector(1, 0, 0, 0, NAN, 1, 1, 1, 1), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1]))
    assert found == pytest.approx({"pass@1": 0.625, "pass@2": 0.75, "pass@4": 1.0, "miss": 0.75**4 / 2})
