"""The prefix tree of all responses: V tokens, at most H of them, and optionally one token that ends a response.

A *state* is a prefix that is not yet a complete response. States are numbered level by level; within level d by the
prefix read as a number of base C, where C = V, or V - 1 with an end token (always the last id, V - 1). So the states
of level d are one slice, and the child of the i-th state of a level by token a < C is the (i C + a)-th of the next.

Letters: S = number of states, V tokens, H horizon, R = number of complete responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST = 2**17
"""Complete responses that a table may have: its float64 logits, values and gradients stay within a few MB."""


@dataclass(frozen=True)
class Tree:
    """All responses of at most `horizon` tokens over `vocab` tokens; with `end`, token `vocab - 1` ends one early.

    Raises:
        ValueError: for fewer than two tokens to go on with, an empty horizon, or more than 2**17 responses.
    """

    vocab: int
    horizon: int
    end: bool = False

    def __post_init__(self) -> None:
        if self.vocab < 2 or self.horizon < 1:
            raise ValueError(
                f"a tree needs at least 2 tokens and a horizon of 1, got vocab={self.vocab}, horizon={self.horizon}"
            )
        if self.responses > LARGEST:
            raise ValueError(
                f"{self.responses} responses are too many to enumerate (at most {LARGEST}): "
                f"lower vocab={self.vocab} or horizon={self.horizon}"
            )

    @property
    def branching(self) -> int:
        """Tokens C after which a response goes on."""
        return self.vocab - self.end

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First state of each level, and the number of states at the end: [H + 1]."""
        found = [0]
        for level in range(self.horizon):
            found.append(found[-1] + self.branching**level)
        return tuple(found)

    @property
    def states(self) -> int:
        """Number of states S."""
        return self.offsets[-1]

    @property
    def responses(self) -> int:
        """Number of complete responses R."""
        ended = self.offsets[-1] if self.end else 0
        full: int = self.branching**self.horizon
        return ended + full

    def level(self, depth: int) -> slice:
        """The states that are prefixes of `depth` tokens."""
        return slice(self.offsets[depth], self.offsets[depth + 1])

    def states_of(self, tokens: Tensor) -> Tensor:
        """[B, T] int64, T <= H: the state before each token of `tokens` [B, T]; past a response's end, any state."""
        width = tokens.shape[1]
        places = self._places[:width]
        # Digits before position t, shifted down to the base-C number of the prefix; ended rows stay in range.
        digits = tokens.clamp(0, self.branching - 1) * places
        before = (digits.cumsum(-1) - digits) // (places * self.branching)
        return before + self._starts[:width]

    @cached_property
    def depth(self) -> Tensor:
        """[S] int64: tokens in each state's prefix."""
        return torch.cat([torch.full((self.branching**d,), d, dtype=torch.int64) for d in range(self.horizon)])

    @cached_property
    def prefixes(self) -> Tensor:
        """[S, H] int64: the tokens of each state's prefix, -1 beyond its depth."""
        rows = []
        for depth in range(self.horizon):
            number = torch.arange(self.branching**depth)
            digits = [(number // self.branching ** (depth - 1 - t)) % self.branching for t in range(depth)]
            blank = torch.full_like(number, -1)
            rows.append(torch.stack([*digits, *[blank] * (self.horizon - depth)], -1))
        return torch.cat(rows)

    @cached_property
    def terminal(self) -> Tensor:
        """[S, V] bool: taking the token in the state completes a response."""
        last = (self.depth == self.horizon - 1)[:, None].expand(self.states, self.vocab).clone()
        if self.end:
            last[:, -1] = True
        return last

    @cached_property
    def enumerated(self) -> tuple[Tensor, Tensor]:
        """Tokens [R, H] int64 (0 beyond the end) and lengths [R] of all complete responses, in `terminal`'s order."""
        state, token = self.terminal.nonzero(as_tuple=True)
        tokens, depth = self.prefixes[state].clone(), self.depth[state]
        tokens[torch.arange(len(state)), depth] = token
        return tokens.clamp(min=0), depth + 1

    @cached_property
    def _places(self) -> Tensor:
        """[H]: value of a digit at each position, in a number of H - 1 digits (the last one is never read)."""
        return self.branching ** torch.arange(self.horizon - 1, -1, -1)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.tensor(self.offsets[:-1])
