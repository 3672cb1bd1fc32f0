"""A training step as the trainer takes it, on a laboratory policy: signals, plan, then update by update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.lab.policy import LabPolicy
from tokenloom.plan import Plan, Update
from tokenloom.signals import Signals


def make_plan(
    algorithm: Algorithm,
    rollouts: Rollouts,
    start: LabPolicy,
    state: Mapping[str, Any],
    *,
    step: int,
    total_steps: int,
    generator: torch.Generator,
    moved: bool,
) -> Plan:
    """The plan of a batch; `start` is the policy at the start of the update, `moved` whether it is another by now."""
    needs = algorithm.needs | ({"old_logprobs"} if moved else set())
    signals = start.signals(rollouts, sorted(needs)) if needs else Signals()
    return algorithm.plan(rollouts, signals, state, step=step, total_steps=total_steps, generator=generator)


def losses(
    algorithm: Algorithm, plan: Plan, rollouts: Rollouts, policy: LabPolicy, generator: torch.Generator
) -> Iterator[tuple[Update, Signals, Tensor]]:
    """Each update with its signals and loss under the policy as it is when the update is reached."""
    needs = sorted(algorithm.loss_needs)
    for update in plan.updates:
        signals = policy.signals(rollouts.rows(update.rows), needs, grad=True, given=update.given)
        settled = algorithm.refresh(update, signals, generator) if algorithm.needs_refresh else update
        loss, _ = algorithm.loss(signals, settled)
        yield update, signals, loss
