"""Ground truth by dynamic programming over the prefix tree: V, Q, A, J, its gradient, occupancy and entropy.

Q(s, a) = r(s, a) + V(s a);  V(s) = sum_a pi(a|s) Q(s, a);  A = Q - V;  J = V(root), a mean over prompts
d(s) = probability of passing through s;  dJ / d logits(s, a) = d(s) pi(a|s) A(s, a) / P

Letters: P prompts, each with a table of its own; S states, V tokens (see `tree`). Everything float64, and exact up to
its rounding: nothing is sampled. Rewards [P, S, V] sit on the (state, token) that earns them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.lab.tree import Tree


@dataclass(frozen=True)
class Exact:
    """What is true of a policy on a task. `probs`, `q`, `advantages` [P, S, V]; `values`, `occupancy` [P, S]."""

    probs: Tensor
    q: Tensor
    advantages: Tensor
    values: Tensor
    occupancy: Tensor

    @property
    def objective(self) -> Tensor:
        """J, a scalar: the expected reward, averaged over prompts."""
        return self.values[:, 0].mean()

    @property
    def gradient(self) -> Tensor:
        """dJ / d logits, [P, S, V]."""
        return self.occupancy[..., None] * self.probs * self.advantages / len(self.probs)

    @property
    def entropy(self) -> Tensor:
        """Nats per sampled token, a scalar: expected entropy of a response over its expected length."""
        # xlogy is 0 where a probability has underflowed.
        each = -torch.xlogy(self.probs, self.probs).sum(-1)
        return (self.occupancy * each).sum() / self.occupancy.sum()

    @property
    def length(self) -> Tensor:
        """Expected tokens of a response, a scalar: one for each state that is passed through."""
        return self.occupancy.sum() / len(self.occupancy)


def solve(tree: Tree, logits: Tensor, rewards: Tensor) -> Exact:
    """Everything about the policy softmax(`logits`) [P, S, V] under `rewards` [P, S, V]; differentiable."""
    probs = law(logits)
    q, values = _backward(tree, rewards, lambda q, level: (probs[:, level] * q).sum(-1))
    return Exact(probs, q, q - values[..., None], values, _forward(tree, probs))


def law(logits: Tensor) -> Tensor:
    """softmax over the last dimension; PyTorch's own takes four times as long when that is a handful of tokens."""
    mass = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return mass / mass.sum(-1, keepdim=True)


def objective(tree: Tree, probs: Tensor, rewards: Tensor) -> Tensor:
    """J alone, a scalar."""
    return _backward(tree, rewards, lambda q, level: (probs[:, level] * q).sum(-1))[1][:, 0].mean()


def best(tree: Tree, rewards: Tensor) -> Tensor:
    """The largest J that any policy has, a scalar: every prompt gets its best response."""
    return _backward(tree, rewards, lambda q, level: q.amax(-1))[1][:, 0].mean()


def _backward(tree: Tree, rewards: Tensor, value_of: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Q [P, S, V] and V [P, S] from the last level up; `value_of` gives a level's values from its Q."""
    qs: list[Tensor] = []
    values: list[Tensor] = []
    for depth in reversed(range(tree.horizon)):
        q = rewards[:, tree.level(depth)]
        if values:
            after = values[-1].reshape(len(rewards), -1, tree.branching)
            # Nothing follows an end token.
            q = q + torch.nn.functional.pad(after, (0, tree.vocab - tree.branching))
        qs.append(q)
        values.append(value_of(q, tree.level(depth)))
    return torch.cat(qs[::-1], 1), torch.cat(values[::-1], 1)


def _forward(tree: Tree, probs: Tensor) -> Tensor:
    """Occupancy [P, S] from the root down."""
    levels = [torch.ones_like(probs[:, :1, 0])]
    for depth in range(tree.horizon - 1):
        onward = probs[:, tree.level(depth), : tree.branching]
        levels.append((levels[-1][..., None] * onward).flatten(1))
    return torch.cat(levels, 1)
