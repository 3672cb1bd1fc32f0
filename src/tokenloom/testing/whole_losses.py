"""Laws of whole losses: in a plain algorithm around it, a part gives one gradient however the batch is split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.catalog import TRAINING_STAGES, Part, parts
from tokenloom.composition import Blend, Bound, Term
from tokenloom.laws import law
from tokenloom.signals import Signals
from tokenloom.testing.batches import random_batch
from tokenloom.testing.variations import same


def host(part: Part) -> Algorithm:
    """A plain algorithm with the part in its stage, for laws that speak of whole losses."""
    handed = {n for p in parts().values() for n in p.gives} & part.inputs.keys()
    advantage = next((p.name for p in parts().values() if handed and handed <= p.gives), "grpo")
    base = Algorithm.compose(advantage=advantage, surrogate="ppo-clip", aggregate="token-mean")
    bound = Bound(part)
    if part.stage == "term":
        return base.override(terms=[Term(bound, 0.3)])
    if part.stage == "blend":
        return base.override(blend=Blend(bound, base.override(advantage="reinforce").advantage))
    single = part.stage in ("advantage", "aggregate", "log_ratio", "bounds", "surrogate", "updates")
    return base.override(**{part.stage: bound if single else [bound]})


def _in_the_loss(part: Part) -> bool:
    return part.stage in TRAINING_STAGES and part.stage not in ("sampling", "metric", "updates", "branch")


@law(_in_the_loss)
def _any_split_gives_the_same_gradient(part: Part) -> None:
    rollouts, signals = random_batch(16)
    algorithm = host(part)
    plan = algorithm.plan(rollouts, signals, one_update=True)
    update = algorithm.refresh(plan.updates[0], signals.rows(plan.updates[0].rows))
    whole = _gradient(algorithm, signals, [update])
    for size in (1, 2, 5):
        order = torch.randperm(len(update), generator=torch.Generator().manual_seed(size))
        split = _gradient(algorithm, signals, [update[rows] for rows in torch.split(order, size)])
        same(whole, split, f"{part.name}: micro-batches of {size} give another gradient")


@law(lambda p: _in_the_loss(p) and not {"draws", "order-dependent"} & p.properties)
def _gathered_ranks_give_the_same_gradient(part: Part) -> None:
    rollouts, signals = random_batch(17)
    algorithm = host(part)
    order = torch.tensor([0, 3, 4, 8, 1, 2, 5, 6, 7])
    ranks = [rollouts.rows(order[:4]), rollouts.rows(order[4:])]
    together = algorithm.coefficients(rollouts, signals)
    gathered = algorithm.coefficients(Rollouts.concat(ranks), signals.rows(order))
    for name, value in together.items():
        same(value[order], gathered[name], f"{part.name}: a batch gathered from two ranks differs in {name}")


def _gradient(algorithm: Algorithm, signals: Signals, pieces: list[Any]) -> Tensor:
    leaves = {n: v.clone().requires_grad_() for n, v in signals.named().items() if n in algorithm.loss_needs}
    alive = signals.replace(**leaves)
    for piece in pieces:
        loss, _ = algorithm.loss(alive.rows(piece.rows), piece)
        if loss.requires_grad:
            torch.autograd.backward(loss)
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for _, v in sorted(leaves.items())]
    return torch.cat([g.reshape(-1) for g in grads])
