"""The task families: each isolates one claim that the literature makes about where credit should go.

A family is a function from a seed to a `Task`: which tokens are right differs between prompts and seeds, the
structure does not. Positions count from 0. To add one, decorate a function with `@family(name, claim)` in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.lab.task import Draft, Lag, Task
from tokenloom.lab.tree import Tree

FIXED = Tree(vocab=4, horizon=6)
"""4 tokens, all responses 6 long: 4,096 of them."""

ENDING = Tree(vocab=4, horizon=7, end=True)
"""3 tokens and an end token, at most 7 long: 3,280 responses."""


@dataclass(frozen=True)
class Family:
    """A name, what it isolates in one sentence, and the task for a seed."""

    name: str
    claim: str
    make: Callable[[int], Task]


_FAMILIES: dict[str, Family] = {}


def families() -> Mapping[str, Family]:
    """Every family by name, in the order of this file."""
    return _FAMILIES


def family(name: str, claim: str) -> Callable[[Callable[[int], Task]], Callable[[int], Task]]:
    """Register a task family."""

    def register(make: Callable[[int], Task]) -> Callable[[int], Task]:
        _FAMILIES[name] = Family(name, claim, make)
        return make

    return register


@family("critical-token", "One token decides, all others are filler: does the credit find it?")
def critical_token(seed: int) -> Task:
    return _all_right(Draft(FIXED, seed), positions=[2], chance=0.25)


@family("conjunction", "Three tokens must all be right: partial successes earn nothing.")
def conjunction(seed: int) -> Task:
    return _all_right(Draft(FIXED, seed), positions=[0, 1, 2], chance=0.55)


@family("repairable", "A wrong first token can be repaired at position 2: it costs little, and only sometimes.")
def repairable(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    right = draft.tokens(2)
    for prompt, (first, _) in enumerate(right):
        draft.favor(prompt, draft.at(0), {first: 0.35})

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        first, repair = right[prompt]
        return (tokens[:, 0] == first) | (tokens[:, 2] == repair)

    return draft.finish(reward, decisive=[0, 2], truth=right)


@family("irreparable", "After a wrong first token nothing helps: no later token deserves blame.")
def irreparable(seed: int) -> Task:
    return _all_right(Draft(FIXED, seed), positions=[0, 2], chance=0.4)


@family("boilerplate", "Four nearly certain tokens of form, required, around two open decisions.")
def boilerplate(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    right = draft.tokens(6)
    for prompt, wanted in enumerate(right):
        for position, token in enumerate(wanted):
            draft.favor(prompt, draft.at(position), {token: 0.5 if position in (2, 4) else 0.99})

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return (tokens == torch.tensor(right[prompt])).all(-1)

    return draft.finish(reward, decisive=[2, 4], truth=[[row[2], row[4]] for row in right])


@family("conflict", "Right and wrong answers are made of the same tokens; only how two of them combine decides.")
def conflict(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    right = draft.tokens(1)

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return (tokens[:, 0] + tokens[:, 2]) % FIXED.vocab == right[prompt][0]

    return draft.finish(reward, decisive=[0, 2], truth=[[0, row[0]] for row in right])


@family(
    "confident-mistake", "The deciding token is one the policy is sure of and wrong about; the filler is uncertain."
)
def confident_mistake(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    right = draft.tokens(1)
    for prompt, (token,) in enumerate(right):
        draft.favor(prompt, draft.at(2), {(token + 1) % FIXED.vocab: 0.84, token: 0.12})
    return _all_right(draft, positions=[2], chance=None, right=right)


@family("spurious", "A frequent token follows success without causing it: its exact advantage is zero.")
def spurious(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    drawn = draft.tokens(2)
    for prompt, (right, frequent) in enumerate(drawn):
        draft.favor(prompt, draft.at(1), {right: 0.4})
        draft.favor(prompt, draft.at(3), {frequent: 0.25})
        draft.favor(prompt, draft.at(3, t1=right), {frequent: 0.85})
    return _all_right(draft, positions=[1], chance=None, right=[[row[0]] for row in drawn])


@family("short-right", "Right answers are short: the token must be right and the response end within 3 tokens.")
def short_right(seed: int) -> Task:
    return _by_length(seed, lambda lengths: lengths <= 3)


@family("long-right", "Right answers are long: the token must be right and the response go on for 5 tokens.")
def long_right(seed: int) -> Task:
    return _by_length(seed, lambda lengths: lengths >= 5)


@family("solved-and-hopeless", "Success rates of 0.95, 0.85, 0.1 and 0.04: what baselines and group statistics favor.")
def solved_and_hopeless(seed: int) -> Task:
    draft = Draft(FIXED, seed)
    right = draft.tokens(1)
    for prompt, rate in enumerate((0.95, 0.85, 0.1, 0.04)):
        draft.favor(prompt, draft.at(2), {right[prompt][0]: rate})
    return _all_right(draft, positions=[2], chance=None, right=right)


@family("off-policy", "Two deciding tokens; the policy being trained has moved since the rollouts were drawn.")
def off_policy(seed: int) -> Task:
    return _all_right(Draft(FIXED, seed), positions=[0, 2], chance=0.5, lag="update")


@family("stale-sampler", "Two deciding tokens; the sampling engine holds older weights than the update starts from.")
def stale_sampler(seed: int) -> Task:
    return _all_right(Draft(FIXED, seed), positions=[0, 2], chance=0.5, lag="sampler")


def _all_right(
    draft: Draft,
    *,
    positions: Sequence[int],
    chance: float | None,
    right: Sequence[Sequence[int]] | None = None,
    lag: Lag = "none",
) -> Task:
    """Reward 1 when every one of `positions` holds its right token, which the policy takes with `chance` at first."""
    wanted = right or draft.tokens(len(positions))
    for prompt, row in enumerate(wanted if chance is not None else []):
        for position, token in zip(positions, row, strict=True):
            draft.favor(prompt, draft.at(position), {token: chance or 0.0})

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return (tokens[:, list(positions)] == torch.tensor(wanted[prompt])).all(-1)

    return draft.finish(reward, decisive=positions, truth=wanted, lag=lag)


def _by_length(seed: int, fits: Callable[[Tensor], Tensor]) -> Task:
    """Reward 1 when the first token is right and the length fits; a fifth of all states ends the response."""
    draft = Draft(ENDING, seed)
    right = draft.tokens(1)
    end = ENDING.vocab - 1
    for prompt, (token,) in enumerate(right):
        draft.favor(prompt, ENDING.depth > 0, {end: 0.2})
        draft.favor(prompt, draft.at(0), {end: 0.02, token: 0.5})

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return (tokens[:, 0] == right[prompt][0]) & fits(lengths)

    return draft.finish(reward, decisive=[0], truth=right)
