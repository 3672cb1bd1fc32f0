"""Credit and gradient of a method on a task, at one policy, against the exact ones.

Many independent batches are drawn from the same policy and planned as in training (parts that couple rows see a real
batch, parts with state carry it on); the loss of each update is differentiated at the policy as it was before the
first update, and a batch's estimate is the sum over its updates. Nothing is learned in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.lab.collect import Batch, Sampler
from tokenloom.lab.exact import solve
from tokenloom.lab.figures import Credit, Direction
from tokenloom.lab.intervals import Estimate
from tokenloom.lab.policy import LabPolicy
from tokenloom.lab.step import losses, make_plan
from tokenloom.lab.task import Task, places
from tokenloom.plan import Plan

DRIFT = 0.3
"""Standard deviation, in nats, of what the logits of a lagging policy differ by: ratios leave [0.8, 1.2] often."""

WARM_UP = 8
"""Batches that only settle the state of parts that carry some, such as a running baseline."""


@dataclass(frozen=True)
class Measured:
    """Estimates by name of a method's gradient, of its coefficients as credit, and of its advantages as credit."""

    gradient: dict[str, Estimate]
    credit: dict[str, Estimate]
    advantages: dict[str, Estimate]


def measure(
    algorithm: Algorithm, task: Task, policy: LabPolicy, *, batches: int, group_size: int, total_steps: int, seed: int
) -> Measured:
    """Compare `batches` estimates with the exact gradient, two thirds into a run of `total_steps`, where
    warm-ups are over and schedules have not ended.

    Parts that read values get the exact ones.

    Raises:
        ValueError: when a part needs what the task cannot provide.
        ArithmeticError: when a gradient is not finite.
    """
    # Two streams: what a part draws must not change which responses it sees.
    generator, drawing = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    other = policy.moved(DRIFT, generator) if task.lag != "none" else policy
    start, current = (policy, other) if task.lag == "update" else (policy, policy)
    sampler = Sampler(task, (other if task.lag == "sampler" else policy).table(), drawing, group_size=group_size)
    policy.critic.set(solve(task.tree, start.table(), task.rewards).values)
    exact = solve(task.tree, current.table(), task.rewards)
    deserved = exact.advantages.flatten()
    credit, advantages = Credit(len(deserved)), Credit(len(deserved))
    estimates, tokens = [], []
    state: dict[str, Any] = {}
    step = 2 * total_steps // 3
    stateful = any("state" in bound.part.inputs for _, bound in algorithm.bound_parts())
    for number in range(-WARM_UP if stateful else 0, batches):
        batch = sampler.collect(algorithm, state, step=step, total_steps=total_steps)
        plan = make_plan(
            algorithm, batch.rollouts, start, state, step=step, total_steps=total_steps, generator=generator,
            moved=start is not current,
        )  # fmt: skip
        state = plan.state
        if number < 0:
            continue
        coefficients, estimate = differentiate(algorithm, plan, batch, current, generator)
        if not bool(estimate.isfinite().all()):
            raise ArithmeticError(f"the gradient of batch {number + 1} is not a number")
        estimates.append(estimate)
        tokens.append(float(batch.tokens))
        mask = batch.rollouts.mask
        cell = cells(task, batch)
        credit.add(coefficients[mask], deserved[cell], cell)
        advantages.add(plan.values["advantages"].to(deserved.dtype)[mask], deserved[cell], cell)
    truth = current.pull_back(exact.gradient)
    direction = Direction(torch.stack(estimates), truth, torch.tensor(tokens, dtype=torch.float64))
    return Measured(direction.figures(), credit.figures(), advantages.figures())


def differentiate(
    algorithm: Algorithm, plan: Plan, batch: Batch, policy: LabPolicy, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-d loss / d logprobs [B, T] and -d loss / d parameters [D], summed over the updates, all at the same policy."""
    coefficients = torch.zeros(batch.rollouts.mask.shape, dtype=torch.float64)
    total = torch.zeros(sum(p.numel() for p in policy.parameters), dtype=torch.float64)
    for update, signals, loss in losses(algorithm, plan, batch.rollouts, policy, generator):
        assert signals.logprobs is not None
        wanted = [signals.logprobs, *policy.parameters]
        given = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        coefficients.index_add_(0, update.rows, -given[0].to(torch.float64))
        total -= torch.cat([g.reshape(-1).to(torch.float64) for g in given[1:]])
    return coefficients, total


def cells(task: Task, batch: Batch) -> Tensor:
    """[N] int64: the flat number in [P, S, V] of every sampled token."""
    rollouts = batch.rollouts
    return (places(task.tree, rollouts) * task.tree.vocab + rollouts.tokens)[rollouts.mask]
