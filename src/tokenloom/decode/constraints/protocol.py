"""A constraint: says of a token whether it may follow what was generated so far.

A prefix is the ids generated after the prompt. A constraint answers for end tokens too: they may come exactly where
what was generated is complete. Three methods are optional:

    mask(prefix)                  [V] bool, all answers at once
    refused_with(prefix, token)   [n] int64: of a refused token, it and all that are refused for the same reason, which
                                  are then not asked about, such as all words that begin with the same wrong letter
    with_eos(ids)                 the same constraint for other end tokens, by which a loop hands over those of the
                                  model's generation configuration
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Constraint(Protocol):
    """What loops need of a constraint; any object with `accept` is one."""

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """Whether `token` may follow `prefix`."""
        ...


def ending_with(constraint: Any, eos: Collection[int]) -> Any:
    """`constraint` for these end tokens, where it can be told.

    Raises:
        ValueError: for an object without `accept`, or without any end token.
    """
    if not callable(getattr(constraint, "accept", None)):
        raise ValueError(
            f"{describe(constraint)} is no constraint: it has no method accept(prefix, token) -> bool; wrap a function "
            "on text in PredicateConstraint"
        )
    if not eos:
        raise ValueError(
            f"{describe(constraint)} needs an end token, which may come where it is fulfilled; give generate an "
            "eos_token_id"
        )
    told = getattr(constraint, "with_eos", None)
    return constraint if told is None else told(frozenset(eos))


def allowed(constraint: Any, prefix: Sequence[int], probs: Tensor) -> Tensor:
    """[V] bool: tokens of positive mass in `probs` [V] that may follow; by `mask` if the constraint has one."""
    possible = probs.detach().cpu() > 0
    mask = getattr(constraint, "mask", None)
    if mask is not None:
        given = torch.as_tensor(mask(prefix), dtype=torch.bool)
        if len(given) > len(possible) and bool(given[len(possible) :].any()):
            raise ValueError(
                f"{describe(constraint)}: its mask has {len(given)} entries, the model's vocabulary {len(possible)}"
            )
        short = min(len(given), len(possible))
        possible[:short] &= given[:short]
        possible[short:] = False
        return possible
    refused_with = getattr(constraint, "refused_with", None)
    open_ids = bytearray(possible.to(torch.uint8).tolist())
    for token in possible.nonzero()[:, 0].tolist():
        if open_ids[token] and not constraint.accept(prefix, token):
            open_ids[token] = 0
            for other in [] if refused_with is None else refused_with(prefix, token).tolist():
                if other < len(open_ids):
                    open_ids[other] = 0
    return torch.frombuffer(open_ids, dtype=torch.uint8) > 0


def describe(constraint: Any) -> str:
    """A constraint in a user's words."""
    name = getattr(constraint, "name", None)
    return name if isinstance(name, str) else f"the constraint {type(constraint).__name__}"
