"""Every random choice of a decoding method goes through one seam: `draw.categorical(p)` and `draw.bernoulli(a)`.

`RandomDraw` chooses by a generator. `law_of` runs a program under a draw that visits every branch, so that the exact
law of its outcome can be compared with the law it claims. The few methods that need noise on a continuous scale ask
`draw.gamma(shapes)`, which has no branches to visit: what they make of given noise is a pure rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Outcome = TypeVar("Outcome", bound=Hashable)


class Draw(Protocol):
    """The source of random choices."""

    def categorical(self, p: Tensor) -> int:
        """An index of `p` [V], proportional to its entries >= 0 (they need not sum to 1).

        Raises:
            ValueError: when no entry is above 0 or one is not a number.
        """
        ...

    def bernoulli(self, a: float) -> bool:
        """True with probability `a`, clamped to [0, 1]."""
        ...

    def gamma(self, shapes: Tensor) -> Tensor:
        """Independent variates of gamma laws with these shapes > 0 and scale 1, float64 on the CPU.

        At shape 1 they are exponential; minus the log of those is Gumbel noise.

        Raises:
            ValueError: for a shape that is not above 0, or where every branch is to be visited (`law_of`).
        """
        ...


class RandomDraw:
    """Chooses by `generator` (on the CPU), or by PyTorch's global state; float64 throughout."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def categorical(self, p: Tensor) -> int:
        """See `Draw`."""
        masses = _masses(p)
        cumulative = masses.cumsum(0)
        at = torch.rand((), generator=self.generator, dtype=torch.float64) * cumulative[-1]
        found = int(torch.searchsorted(cumulative, at, right=True))
        if found < len(masses) and masses[found] > 0:
            return found
        # Rounding may carry `at` to the very end: never a token without mass.
        return int(masses.nonzero()[-1])

    def bernoulli(self, a: float) -> bool:
        """See `Draw`."""
        return bool(torch.rand((), generator=self.generator, dtype=torch.float64) < a)

    def gamma(self, shapes: Tensor) -> Tensor:
        """See `Draw`."""
        wide = shapes.detach().to("cpu", torch.float64)
        if not bool((wide > 0).all()):
            raise ValueError(f"gamma laws have shapes above 0; got {shapes}")
        return torch._standard_gamma(wide, generator=self.generator)


def law_of(program: Callable[[Draw], Outcome], *, most: int = 1_000_000) -> dict[Outcome, float]:
    """The exact law of what `program` returns: every branch of its choices is run once.

    Raises:
        RuntimeError: after `most` branches.
    """
    law: dict[Outcome, float] = {}
    pending: list[list[int]] = [[]]
    branches = 0
    while pending:
        branches += 1
        if branches > most:
            raise RuntimeError(f"more than {most} branches; make the vocabulary, the depth or the width smaller")
        draw = _ScriptedDraw(pending.pop())
        outcome = program(draw)
        law[outcome] = law.get(outcome, 0.0) + draw.probability
        pending += draw.others
    return law


def expectation(program: Callable[[Draw], tuple[Outcome, float]], *, most: int = 1_000_000) -> dict[Outcome, float]:
    """`E[weight 1{outcome = x}]` for every x, for a program that returns an outcome and its weight; as `law_of`."""
    total: dict[Outcome, float] = {}
    for (outcome, weight), probability in law_of(program, most=most).items():
        total[outcome] = total.get(outcome, 0.0) + probability * weight
    return total


class _ScriptedDraw:
    """Follows `script`, then takes the first possible choice, and notes the choices not taken on the way."""

    def __init__(self, script: list[int]) -> None:
        self._script, self._taken = script, list[int]()
        self.probability, self.others = 1.0, list[list[int]]()

    def categorical(self, p: Tensor) -> int:
        masses = _masses(p)
        return self._choose((masses / masses.sum()).tolist())

    def bernoulli(self, a: float) -> bool:
        a = min(max(float(a), 0.0), 1.0)
        return self._choose([1.0 - a, a]) == 1

    def gamma(self, shapes: Tensor) -> Tensor:
        raise ValueError("noise on a continuous scale has no branches to visit; give its rule noise by hand instead")

    def _choose(self, law: list[float]) -> int:
        step = len(self._taken)
        if step < len(self._script):
            choice = self._script[step]
        else:
            possible = [i for i, mass in enumerate(law) if mass > 0]
            choice = possible[0]
            self.others += [[*self._taken, other] for other in possible[1:]]
        self._taken.append(choice)
        self.probability *= law[choice]
        return choice


def _masses(p: Tensor) -> Tensor:
    masses = p.detach().to("cpu", torch.float64)
    # Both ends in one pass over what may be a large vocabulary; the least of what is not all numbers is none.
    if masses.ndim != 1 or not len(masses) or not (masses.amin() >= 0 and masses.amax() > 0):
        raise ValueError(f"a law to draw from needs entries >= 0 of which one is above 0, in one dimension; got {p}")
    return masses
