"""Learning runs: they learn, they count every sample, and they step as the trainer does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lab.tiny import table_of, tiny_task, unregistered
from tokenloom.algorithm import Algorithm
from tokenloom.lab.families import families
from tokenloom.lab.learn import Learned, learn
from tokenloom.lab.optimizer import ScaleFree
from tokenloom.lab.oracle import oracle
from tokenloom.lab.table import TablePolicy
from tokenloom.masked import to_tokens


def run(algorithm: Algorithm, family: str, samples: int = 1920, **rest: bool) -> tuple[Learned, TablePolicy]:
    task = families()[family].make(0)
    policy = table_of(task)
    return learn(algorithm, task, policy, samples=samples, group_size=8, seed=1, **rest), policy


def test_rloo_finds_the_critical_token_and_exact_advantages_find_it_sooner() -> None:
    loo, _ = run(Algorithm.from_recipe("rloo"), "critical-token")
    exact, _ = run(oracle(), "critical-token", exact_critic=True)
    assert loo.objective[0] == pytest.approx(0.25)
    assert loo.objective[-1] > 0.95 * loo.best
    assert exact.samples_needed < loo.samples_needed < 1920
    assert 0 < loo.entropy_kept < 1
    assert loo.samples == list(range(0, 1921, 32))
    assert len(loo.objective) == len(loo.samples)


def test_the_same_seed_learns_the_same() -> None:
    first, again = (run(Algorithm.from_recipe("grpo"), "conjunction", samples=320)[0] for _ in range(2))
    assert first.objective == again.objective


@pytest.mark.parametrize("family", ["off-policy", "stale-sampler"])
def test_lagging_policies_learn_too(family: str) -> None:
    learned, _ = run(Algorithm.from_recipe("rloo"), family)
    assert learned.objective[-1] > 0.9


def test_off_policy_the_ratio_is_to_the_policy_that_drew() -> None:
    seen: list[float] = []

    def watching(rewards: Tensor, mask: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
        seen.append(float((old_logprobs - sampler_logprobs)[mask].abs().max()))
        return to_tokens(rewards, mask)

    def gap(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        gaps.append(float(log_ratio.detach()[mask].abs().max()))
        return torch.where(mask, log_ratio * advantages, 0.0)

    algorithm = Algorithm.compose(
        advantage=unregistered("advantage", watching), surrogate=unregistered("surrogate", gap)
    )
    for family, ratio_moves, sampler_moves in (("off-policy", True, False), ("stale-sampler", False, True)):
        seen, gaps = [], []
        run(algorithm, family, samples=32 * 9)
        fresh = [i for i in range(9) if i % 4 == 0]
        for moves, values in ((ratio_moves, gaps), (sampler_moves, seen)):
            assert all((v > 1e-6) == (moves and i not in fresh) for i, v in enumerate(values)), (family, values)


def test_samples_count_dropped_groups_and_the_reference() -> None:
    dropping, _ = run(Algorithm.from_recipe("dapo"), "solved-and-hopeless", samples=640)
    steps = [b - a for a, b in zip(dropping.samples, dropping.samples[1:], strict=False)]
    assert max(steps) > 32
    assert all(s % 32 == 0 for s in steps)

    def reads(rewards: Tensor, mask: Tensor, reference_rewards: Tensor) -> Tensor:
        return to_tokens(rewards - reference_rewards, mask)

    task = tiny_task(prompts=2)
    algorithm = Algorithm.compose(advantage=unregistered("advantage", reads))
    learned = learn(algorithm, task, table_of(task), samples=60, group_size=4, seed=0)
    assert learned.samples == [0, 16, 32, 48, 64]


def test_every_update_of_a_step_moves_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    original = ScaleFree.step

    def counted(self: ScaleFree, gradients: list[Tensor]) -> None:
        nonlocal steps
        steps += 1
        original(self, gradients)

    monkeypatch.setattr(ScaleFree, "step", counted)
    run(Algorithm.from_recipe("rloo").override(updates={"epochs": 2, "mini_batches": 4}), "conjunction", samples=96)
    assert steps == 3 * 2 * 4


def test_a_critic_learns_from_the_algorithms_own_loss() -> None:
    learned, policy = run(Algorithm.from_recipe("ppo-gae"), "critical-token", samples=640)
    before = table_of(families()["critical-token"].make(0))
    assert not torch.equal(policy.critic.values, before.critic.values)
    # The policy has come to succeed more often, and the critic has followed it at the root.
    assert float(policy.critic.values[:, 0].detach().mean()) > 0.5
    assert learned.objective[-1] > 0.5


def test_updates_that_are_no_numbers_are_left_out_and_counted() -> None:
    calls = 0

    def sometimes(rewards: Tensor, mask: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return to_tokens(rewards * (math.inf if calls == 2 else 1.0), mask)

    learned, policy = run(Algorithm.compose(advantage=unregistered("advantage", sometimes)), "conjunction", samples=96)
    assert learned.skipped == 1
    assert bool(policy.table().isfinite().all())


def test_samples_needed() -> None:
    base = Learned([0, 32, 64], [0.2, 0.96, 0.9], 1.0, 1.0, 0.0, 0)
    assert base.samples_needed == 32
    assert Learned([0, 32], [0.2, 0.47], 0.5, 1.0, 0.0, 0).samples_needed == math.inf
