"""Estimates of the gradient against the enumeration of all batches, and sampled ones against their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.tiny import every_batch, table_of, tiny_task, unregistered
from tokenloom.algorithm import Algorithm
from tokenloom.lab.estimate import differentiate, measure
from tokenloom.lab.exact import solve
from tokenloom.lab.families import families
from tokenloom.lab.oracle import oracle
from tokenloom.lab.step import make_plan
from tokenloom.lab.task import Task
from tokenloom.lab.tree import Tree
from tokenloom.masked import to_tokens

SCORE = {"surrogate": "reinforce/score", "aggregate": {"part": "dr-grpo/constant-length", "divisor": "one"}}


def distorted(rewards: Tensor, mask: Tensor) -> Tensor:
    """The reward, but little of it for the first token: a biased gradient."""
    return to_tokens(rewards, mask) * torch.tensor([0.1, 1.0])


def expectation(algorithm: Algorithm, task: Task, rows: int) -> Tensor:
    """E of a method's estimate over all batches, [D]."""
    policy = table_of(task)
    policy.critic.set(solve(task.tree, policy.table(), task.rewards).values)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(task.logits.numel(), dtype=torch.float64)
    seen = 0.0
    for probability, batch in every_batch(task, rows):
        plan = make_plan(algorithm, batch.rollouts, policy, {}, step=0, total_steps=1, generator=generator, moved=False)
        total += probability * differentiate(algorithm, plan, batch, policy, generator)[1]
        seen += probability
    assert seen == pytest.approx(1, abs=1e-12)
    return total


def truth(task: Task) -> Tensor:
    return solve(task.tree, task.logits, task.rewards).gradient.reshape(-1)


@pytest.mark.parametrize("tree", [Tree(2, 2), Tree(3, 2, end=True)], ids=str)
def test_exact_advantages_and_leave_one_out_have_no_bias_at_all(tree: Tree) -> None:
    task = tiny_task(tree)
    plain = Algorithm.compose(advantage="reinforce", **SCORE)
    loo = Algorithm.compose(advantage="rloo", **SCORE)
    critic = Algorithm.compose(advantage={"part": "ppo-gae", "lam": 0.0, "whitened": False}, **SCORE)
    for algorithm in (oracle(), plain, loo, critic):
        torch.testing.assert_close(expectation(algorithm, task, 2), truth(task), rtol=0, atol=1e-14)


def test_the_token_mean_is_biased_when_lengths_vary_and_only_scaled_when_not() -> None:
    average = {**SCORE, "aggregate": "token-mean"}
    algorithm = Algorithm.compose(advantage="reinforce", **average)
    fixed = tiny_task(Tree(2, 2))
    torch.testing.assert_close(expectation(algorithm, fixed, 2), truth(fixed) / 2, rtol=0, atol=1e-14)
    ending = tiny_task(Tree(3, 2, end=True))
    mean, exact = expectation(algorithm, ending, 2), truth(ending)
    cosine = float(mean @ exact / (mean.norm() * exact.norm()))
    assert cosine < 0.999


@pytest.mark.parametrize("seed", [1, 3])
def test_sampled_figures_hold_the_enumerated_ones_in_their_intervals(seed: int) -> None:
    """Bias and noise of a biased method, sampled, against their exact values from all batches of 2 rows."""
    task = tiny_task(Tree(2, 2), seed=seed)
    algorithm = Algorithm.compose(advantage=unregistered("advantage", distorted), **SCORE)
    mean, exact = expectation(algorithm, task, 2), truth(task)
    second = _second_moment(algorithm, task)
    along = float(mean @ exact)
    length = float(exact @ exact)
    expected = {
        "cosine": along / float(mean.norm()) / length**0.5,
        "bias": float(mean @ mean) * length / along**2 - 1,
        "noise": 4 * (second - float(mean @ mean)) * length / along**2,
        "snr": float(mean @ mean) / (4 * (second - float(mean @ mean))),
        "scale": along / length,
    }
    assert expected["cosine"] < 0.97
    found = measure(algorithm, task, table_of(task), batches=400, group_size=2, total_steps=3, seed=5).gradient
    for name, value in expected.items():
        # Twice the 95 % half-width: 1 in 10,000 would lie outside, and ten numbers are looked at.
        assert abs(found[name].value - value) < 2 * found[name].half, name
        assert found[name].half < 0.5 * abs(value) + 0.1, name


def _second_moment(algorithm: Algorithm, task: Task) -> float:
    """E |estimate|^2 over all batches of 2 rows."""
    policy, generator = table_of(task), torch.Generator().manual_seed(0)
    total = 0.0
    for probability, batch in every_batch(task, 2):
        plan = make_plan(algorithm, batch.rollouts, policy, {}, step=0, total_steps=1, generator=generator, moved=False)
        estimate = differentiate(algorithm, plan, batch, policy, generator)[1]
        total += probability * float(estimate @ estimate)
    return total


@pytest.mark.parametrize("name", ["irreparable", "short-right"])
def test_plain_reinforce_converges_to_the_exact_gradient(name: str) -> None:
    task = families()[name].make(0)
    algorithm = Algorithm.compose(advantage="reinforce", **SCORE)
    found = measure(algorithm, task, table_of(task), batches=200, group_size=8, total_steps=3, seed=1)
    for figure, value in (("scale", 1.0), ("bias", 0.0), ("cosine", 1.0)):
        estimate = found.gradient[figure]
        assert abs(estimate.value - value) < 2 * estimate.half, figure
        assert estimate.half < 0.1, figure


def test_exact_advantages_are_exact_credit() -> None:
    task = families()["conjunction"].make(0)
    found = measure(oracle(), task, table_of(task), batches=20, group_size=8, total_steps=3, seed=1)
    assert found.credit["correlation"].value == pytest.approx(1, abs=1e-12)
    assert found.credit["error"].value < 1e-6
    assert found.credit["mean_correlation"].value == pytest.approx(1, abs=1e-12)
    assert found.advantages["correlation"].value == pytest.approx(1, abs=1e-12)


def test_a_method_that_ignores_the_deciding_token_has_no_part_along_the_gradient() -> None:
    def elsewhere(advantages: Tensor, mask: Tensor) -> Tensor:
        keep = mask.clone()
        keep[:, 2] = False
        return keep.to(advantages.dtype)

    task = families()["critical-token"].make(0)
    algorithm = Algorithm.compose(advantage="rloo", weight=[unregistered("weight", elsewhere)], **SCORE)
    found = measure(algorithm, task, table_of(task), batches=20, group_size=8, total_steps=3, seed=1).gradient
    assert found["cosine"].value == 0
    assert found["bias"].value == found["noise"].value == float("inf")
    assert found["snr"].value == 0


def test_a_lagging_sampler_is_corrected_by_importance_weights() -> None:
    """Without correction the mean estimate is that of a mixture of policies; with exact weights it is not."""

    def weighted(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
        gap = torch.where(mask, old_logprobs - sampler_logprobs, 0.0)
        return gap.sum(-1, keepdim=True).exp() * mask

    task = families()["stale-sampler"].make(0)
    plain = Algorithm.compose(advantage="reinforce", **SCORE)
    corrected = Algorithm.compose(
        advantage="reinforce", weight=[unregistered("weight", weighted)], updates={"part": "mini-batches"}, **SCORE
    )
    figures = [_stale(a, task) for a in (plain, corrected)]
    assert figures[0]["bias"].value > 3 * figures[0]["bias"].half
    assert abs(figures[1]["bias"].value) < 2 * figures[1]["bias"].half
    assert abs(figures[1]["scale"].value - 1) < 2 * figures[1]["scale"].half


def _stale(algorithm: Algorithm, task: Task) -> dict[str, Any]:
    return dict(measure(algorithm, task, table_of(task), batches=300, group_size=8, total_steps=3, seed=2).gradient)


def test_state_is_settled_before_anything_is_measured_and_carried_on() -> None:
    steps: list[int | None] = []

    def counting(rewards: Tensor, mask: Tensor, state: int | None) -> tuple[Tensor, int]:
        steps.append(state)
        return to_tokens(rewards, mask), (state or 0) + 1

    task = tiny_task(Tree(2, 2))
    algorithm = Algorithm.compose(advantage=unregistered("advantage", counting), **SCORE)
    measure(algorithm, task, table_of(task), batches=3, group_size=2, total_steps=3, seed=0)
    assert steps == [None, *range(1, 11)]


def test_a_gradient_that_is_not_a_number_is_an_error() -> None:
    def broken(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards * float("inf"), mask)

    task = tiny_task(Tree(2, 2))
    algorithm = Algorithm.compose(advantage=unregistered("advantage", broken), **SCORE)
    with pytest.raises(ArithmeticError, match="batch 1 is not a number"):
        measure(algorithm, task, table_of(task), batches=3, group_size=2, total_steps=3, seed=0)


def test_every_update_of_a_batch_counts() -> None:
    """Two epochs at the same policy are twice the gradient; two mini-batches of equal groups are twice their mean."""
    task = tiny_task(Tree(2, 2), prompts=2)
    single = Algorithm.compose(advantage="reinforce", **SCORE)
    found: Sequence[float] = [
        measure(a, task, table_of(task), batches=10, group_size=4, total_steps=3, seed=0).gradient["scale"].value
        for a in (single, single.override(updates={"epochs": 2}), single.override(updates={"mini_batches": 2}))
    ]
    assert found[1] == pytest.approx(2 * found[0])
    assert found[2] == pytest.approx(2 * found[0])
