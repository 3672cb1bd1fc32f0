"""A task of the laboratory: prompts with enumerable responses, their rewards, and the policy to begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.lab.tree import Tree

Lag = Literal["none", "sampler", "update"]
"""Which policy drew the rollouts: the one at the start of the update ("none"); an older one, as when the sampling
engine still holds old weights ("sampler"); or the one at the start of the update while the policy being trained has
moved on since, as in later mini-batches ("update")."""


@dataclass(frozen=True, eq=False)
class Task:
    """P prompts over one tree. `rewards` and `logits` (the initial policy) are [P, S, V] float64.

    A reward sits on the (state, token) that completes a response. `decisive` are the positions whose tokens are the
    response's answer; `truth` [P] is a right answer of each prompt.
    """

    tree: Tree
    rewards: Tensor
    logits: Tensor
    decisive: tuple[int, ...]
    truth: tuple[str, ...]
    lag: Lag = "none"

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.logits)


Reward = Callable[[int, Tensor, Tensor], Tensor]
"""(prompt, tokens [R, H], lengths [R]) -> rewards [R] of all complete responses."""


class Draft:
    """A task in the making: random initial logits, and the means to shape them and to set rewards.

    Every state's logits start as independent normals of standard deviation `spread`, so that entropies differ.
    """

    def __init__(self, tree: Tree, seed: int, *, prompts: int = 4, spread: float = 0.5) -> None:
        self.tree, self.prompts = tree, prompts
        self.generator = torch.Generator().manual_seed(seed)
        shape = (prompts, tree.states, tree.vocab)
        self.logits = spread * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, count: int) -> list[list[int]]:
        """`count` random tokens for each prompt that do not end a response."""
        drawn = torch.randint(self.tree.branching, (self.prompts, count), generator=self.generator)
        return [[int(t) for t in row] for row in drawn]

    def at(self, position: int, **seen: int) -> Tensor:
        """[S] bool: states before `position`; `at(4, t1=2)` only those whose token 1 is 2."""
        found = self.tree.depth == position
        for name, token in seen.items():
            found = found & (self.tree.prefixes[:, int(name.removeprefix("t"))] == token)
        return found

    def favor(self, prompt: int, where: Tensor, chances: Mapping[int, float]) -> None:
        """In the states `where` [S] bool, give tokens these probabilities; the others share the rest as before."""
        logits = self.logits[prompt, where]
        others = torch.tensor([token not in chances for token in range(self.tree.vocab)])
        logits[:, others] = logits[:, others].log_softmax(-1) + math.log(1 - sum(chances.values()))
        for token, probability in chances.items():
            logits[:, token] = math.log(probability)
        self.logits[prompt, where] = logits

    def finish(
        self, reward: Reward, *, decisive: Sequence[int], truth: Sequence[Sequence[int]], lag: Lag = "none"
    ) -> Task:
        """The task whose complete responses earn `reward`; `truth` are each prompt's right tokens at `decisive`."""
        tokens, lengths = self.tree.enumerated
        rewards = torch.zeros_like(self.logits)
        for prompt in range(self.prompts):
            rewards[prompt, self.tree.terminal] = reward(prompt, tokens, lengths).to(torch.float64)
        answers = tuple(spell(row) for row in truth)
        return Task(self.tree, rewards, self.logits, tuple(decisive), answers, lag)


def spell(tokens: Sequence[int]) -> str:
    """Tokens as the text of an answer."""
    return " ".join(map(str, tokens))


def prompt_tokens(prompt: int, tree: Tree) -> Tensor:
    """[2] int64: a prompt in the responses' own tokens, different for each of V^2 prompts, in both places if it can."""
    low, high = prompt % tree.vocab, prompt // tree.vocab
    return torch.tensor([low, (low + high) % tree.vocab])


def places(tree: Tree, rollouts: Rollouts) -> Tensor:
    """[B, T] int64: the state before each token, numbered over all prompts as in a flattened [P, S] table."""
    assert rollouts.prompts is not None
    prompts = torch.tensor([meta["prompt"] for meta in rollouts.prompts])
    return prompts[:, None] * tree.states + tree.states_of(rollouts.tokens)
