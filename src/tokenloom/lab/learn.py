"""Learning on a task until a budget of samples is spent, J known exactly after every step.

Every response that is drawn counts as a sample, those of dropped groups and of the reference included. Every batch
moves the policy equally far (`optimizer.ScaleFree`), whatever the method.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tokenloom.algorithm import Algorithm
from tokenloom.lab.collect import Sampler
from tokenloom.lab.exact import best, law, objective, solve
from tokenloom.lab.policy import LabPolicy
from tokenloom.lab.step import losses, make_plan
from tokenloom.lab.task import Task

LAG = 4
"""Steps after which a lagging policy is brought up to date."""

REACHED = 0.95
"""Share of the best J at which a task counts as learned."""


@dataclass(frozen=True)
class Learned:
    """One run: J after `samples` responses, the best J, entropy per token at the end over that at the beginning,
    processor seconds of a step (plan, signals, loss, gradient; sampling apart), and updates that were not finite.
    """

    samples: list[int]
    objective: list[float]
    best: float
    entropy_kept: float
    seconds: float
    skipped: int

    @property
    def samples_needed(self) -> float:
        """Samples until J first reached 95 % of the best; infinity when it did not."""
        found = (n for n, j in zip(self.samples, self.objective, strict=True) if j >= REACHED * self.best)
        return next(found, math.inf)


def learn(
    algorithm: Algorithm,
    task: Task,
    policy: LabPolicy,
    *,
    samples: int,
    group_size: int,
    seed: int,
    exact_critic: bool = False,
) -> Learned:
    """Train `policy` in place on `samples` responses. A critic starts at the exact values and learns from the loss,
    unless it is kept exact.

    Raises:
        ValueError: when a part needs what the task cannot provide.
    """
    # Two streams: what a part draws must not change which responses it sees.
    generator, drawing = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    optimizer = policy.optimizer()
    total_steps = -(-samples // (task.prompts * group_size))
    behavior, table = policy, policy.table()
    exact = solve(task.tree, table, task.rewards)
    policy.critic.set(exact.values)
    seen, curve, seconds = [0], [float(exact.objective)], []
    state: dict[str, Any] = {}
    skipped = step = 0
    while seen[-1] < samples:
        if task.lag != "none" and step % LAG == 0:
            behavior = policy.copy()
        if exact_critic:
            policy.critic.set(solve(task.tree, table, task.rewards).values)
        drawn_from = behavior.table() if behavior is not policy else table
        sampler = Sampler(task, drawn_from, drawing, group_size=group_size)
        batch = sampler.collect(algorithm, state, step=step, total_steps=total_steps)
        started = time.process_time()
        start = behavior if task.lag == "update" else policy
        plan = make_plan(
            algorithm, batch.rollouts, start, state, step=step, total_steps=total_steps, generator=generator,
            moved=start is not policy,
        )  # fmt: skip
        state = plan.state
        parameters = [*policy.parameters, policy.critic.values]
        optimizer.begin(len(plan.updates))
        for _, _, loss in losses(algorithm, plan, batch.rollouts, policy, generator):
            *gradients, critic = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            if not all(bool(g.isfinite().all()) for g in (*gradients, critic)):
                skipped += 1
                continue
            optimizer.step(gradients)
            if "values" in algorithm.loss_needs:
                policy.critic.step(critic)
        seconds.append(time.process_time() - started)
        table = policy.table()
        seen.append(seen[-1] + batch.rows)
        curve.append(float(objective(task.tree, law(table), task.rewards)))
        step += 1
    kept = float(solve(task.tree, table, task.rewards).entropy / exact.entropy)
    return Learned(seen, curve, float(best(task.tree, task.rewards)), kept, median(seconds), skipped)
