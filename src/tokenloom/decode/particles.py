"""What loops of weighted particles give: strings with weights, of which one is drawn as a prompt's response."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tokenloom.draw import Draw
from tokenloom.methods.decoding.smc import log_mean_exp


@dataclass(frozen=True)
class Posterior:
    """What is known of a prompt's strings given what is wanted: weighted strings and the constant."""

    strings: list[list[int]]
    log_weights: Tensor
    """[N], unnormalized."""

    @property
    def log_normalizer(self) -> float:
        """log of the estimated constant: the mass of allowed strings, times the mean over them of what else was
        asked for; -inf when no string was found."""
        return log_mean_exp(self.log_weights)

    def law(self) -> dict[tuple[int, ...], float]:
        """The estimated law of strings; empty when none was found."""
        if self.log_normalizer == -math.inf:
            return {}
        law: dict[tuple[int, ...], float] = {}
        for string, weight in zip(self.strings, self.log_weights.softmax(0).tolist(), strict=True):
            if weight > 0:
                law[tuple(string)] = law.get(tuple(string), 0.0) + weight
        return law

    def drawn(self, draw: Draw) -> list[int]:
        """A string by its weight; where all weights are 0, the longest."""
        if self.log_normalizer == -math.inf:
            return max(self.strings, key=len)
        return self.strings[draw.categorical(self.log_weights.softmax(0))]


def check_swarm(method: str, particles: int, ess: float, **at_least_one: int) -> None:
    """Refuse numbers that no swarm of weighted particles can have.

    Raises:
        ValueError: for `particles` or one of `at_least_one` below 1, or `ess` outside [0, 1].
    """
    given = {"particles": particles, **at_least_one}
    if bad := {name: n for name, n in given.items() if n < 1}:
        raise ValueError(f"{method}: " + ", ".join(f"{name} must be at least 1, got {n}" for name, n in bad.items()))
    if not 0 <= ess <= 1:
        raise ValueError(f"{method}: ess is a share of the particles, between 0 and 1; got {ess}")
