"""The yardstick: REINFORCE with the exact advantage, which no method of a real training run can have.

A = r + V(next state) - V(state) with the exact V: the next state is certain, so the one-step error is the advantage.
Each token's gradient counts alike, divided by the rows of the batch: on policy, its mean is the gradient of J exactly.
What noise remains is that of drawing the responses.

The parts are bound by hand and not registered: they are no methods, and the catalog must not offer them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import Part, Stage
from tokenloom.composition import Bound
from tokenloom.masked import where_mask
from tokenloom.parameters import signature_inputs

NAME = "(exact advantage)"


def exact_advantage(token_rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B, T] of one step; the state after the last token is worth 0."""
    after = where_mask(values, mask).roll(-1, -1)
    after[:, -1] = 0
    return where_mask(token_rewards + after - values, mask)


def per_row(mask: Tensor, weights: Tensor) -> Tensor:
    """Scale [B, T]: one over the rows of the update, the same for every token."""
    return (mask / len(mask)).to(weights.dtype)


def score(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Objective [B, T]: A * logprob."""
    return where_mask(advantages * logprobs, mask)


def oracle() -> Algorithm:
    """The composition; it needs the exact critic."""
    return Algorithm.compose(
        advantage=_bound("advantage", exact_advantage),
        aggregate=_bound("aggregate", per_row),
        surrogate=_bound("surrogate", score),
        preset=NAME,
    )


def _bound(stage: Stage, function: Callable[..., Tensor]) -> Bound:
    name = f"lab/{function.__name__}"
    inputs, hyperparameters = signature_inputs(name, function)
    return Bound(Part(name, stage, "batch" if stage == "aggregate" else "token", "", function, inputs, hyperparameters))
