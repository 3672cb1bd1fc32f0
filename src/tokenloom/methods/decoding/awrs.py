"""AWRS: a token that a constraint accepts, by few questions, with an unbiased weight (arXiv 2504.05410).

Gives (x, w) with E[e^w 1{x = v}] = p(v) 1{v accepted} for every v; p = e^logw, so Σ_v is the mass that is valid.

recursive: tokens are drawn without replacement until one, x, is accepted; with m the mass not yet rejected,
    w = log m if the next token in the order is accepted too, else log p(x): a coin for the rest.
geometric: `max_accepts` = a passes of sampling with replacement, rebuilt from draws without: before each question,
    a geometric number of repeats of rejected tokens counts as rejections; n_acc accepted, n_rej rejected:
    w = log(min(a-1, n_acc) / (n_acc + min(n_rej, max_rejects) - 1)); the first accepted token is the result.
improper: the first accepted token, weight 0.

Deviations from the official code: "auto" asks about a token of mass >= 2/3 first; if that is rejected, the recursion
goes on without it (exact, as the choice depends on the law and the constraint alone), otherwise it is geometric, as
there. With `rest` (all answers at once) a search with `patience` rejections behind it, or less than `tail` of the mass
before it, ends exactly, weight log(valid mass of the rest), where the official one goes on, or gives up. With
`refused_with` a refusal takes others out that need no question of their own: exact, as they are invalid and the
recursion is the same on whatever is left. A long search draws the order of all that are left at once, by an exponential
race, which has the same law. Geometric counts are drawn by their binary digits, which are independent, so that all
chance goes through `draw`. Fidelity: code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw

_PAPER = "arXiv:2504.05410"
_PEAK = 2 / 3
TAIL = 1e-5
"""Share of the mass below which a search gives up, as in the official code."""
_SINGLY = 32
"""Draws one by one before those of a whole order at once, which cost as much as these, pay."""
_IMPOSSIBLE = -45.0
"""Log-probability of a binary digit that never happens in double precision."""


@part("awrs", stage="choose", scope="row", paper=_PAPER)
def awrs_token(
    logw: Tensor,
    accept: Callable[[int], bool],
    draw: Draw,
    target: Tensor | None = None,
    rest: Callable[[], Tensor] | None = None,
    refused_with: Callable[[int], Tensor] | None = None,
    *,
    mode: Literal["auto", "recursive", "geometric", "improper"] = "auto",
    max_accepts: int = 2,
    max_rejects: int | None = None,
    tail: float = TAIL,
    patience: int = 16,
) -> tuple[int, float]:
    """A token and its log weight from `logw` [V], unnormalized (EOS included).

    `target` [V]: other log weights that the result shall be properly weighted for; `logw` then only proposes.
    `rest()`: [V] bool, all answers of `accept`, asked for after `patience` rejections. Without it, a search ends with
    weight -inf once less than `tail` of the mass is left. What is rejected last comes with weight -inf.
    `refused_with(token)`: ids that are known to be refused because `token` was.

    Raises:
        ValueError: for limits below 2, which no proper weight can be had from, or a law without mass.
    """
    if mode != "improper" and (max_accepts < 2 or (max_rejects is not None and max_rejects < 2)):
        raise ValueError("awrs: max_accepts and max_rejects must be at least 2, or mode 'improper'")
    order = _Order(logw, draw)
    cap = math.inf if max_rejects is None else max_rejects
    asked: dict[int, bool] = {}

    def ask(token: int) -> bool:
        if token not in asked:
            asked[token] = bool(accept(token))
            if not asked[token] and refused_with is not None:
                order.remove(refused_with(token))
        return asked[token]

    if mode == "improper":
        return _improper(order, ask, cap, tail, patience, rest)
    first_rejected = False
    if mode == "auto":
        peak = int(order.masses.argmax())
        geometric = max_accepts > 2
        if not geometric and float(order.masses[peak]) >= _PEAK:
            geometric = ask(peak)
            first_rejected = not geometric
            if first_rejected:
                order.remove(peak)
        mode = "geometric" if geometric else "recursive"
        if first_rejected and (order.mass <= 0 or cap <= 1):
            return peak, -math.inf
    if mode == "geometric":
        token, log_weight = _geometric(order, ask, draw, max_accepts, cap, tail)
    else:
        token, log_weight = _recursive(order, ask, cap - first_rejected, tail, patience, rest)
    log_weight += order.log_total
    if target is not None and log_weight > -math.inf:
        log_weight += float(target[token]) - float(logw[token])
    return token, log_weight


class _Order:
    """Draws tokens without replacement; `masses` [V] are those of the tokens left, of a whole of 1."""

    def __init__(self, logw: Tensor, draw: Draw) -> None:
        logw = logw.detach().double().cpu()
        self.log_total = float(logw.logsumexp(0))
        if not math.isfinite(self.log_total):
            raise ValueError(f"awrs: the law has no mass or is not a number (log of the sum {self.log_total})")
        self.masses = (logw - self.log_total).exp()
        self.draw = draw
        self.singly, self.thinned = _SINGLY, False
        self.queue: list[tuple[int, float]] = []
        self._anew()

    def next(self) -> tuple[int, float]:
        if not self.queue and self.singly == 0:
            self._race()
        while self.queue:
            token, left = self.queue.pop()
            mass = float(self.masses[token])
            if mass > 0:
                self.masses[token] = 0.0
                self.mass = float(self.masses.sum()) if self.thinned else left
                return token, mass
        self.singly -= 1
        token = self.draw.categorical(self.masses)
        mass = float(self.masses[token])
        self.masses[token] = 0.0
        self.mass = float(self.masses.sum())
        return token, mass

    def remove(self, tokens: int | Tensor) -> None:
        self.masses[tokens] = 0.0
        self.mass = float(self.masses.sum())
        self.thinned = True

    def put_back(self, token: int, mass: float) -> None:
        self.masses[token] = mass
        self._anew()

    def _anew(self) -> None:
        # Summed anew: 1 minus what was rejected would lose small rests to rounding.
        self.mass = float(self.masses.sum())
        # Whatever was drawn before, an order of those left is as good as any other, so that one may begin anew.
        self.queue = []
        self.singly = _SINGLY

    def _race(self) -> None:
        """The whole order of those left: who comes first where each takes an exponential time of rate its mass."""
        times = self.draw.gamma(torch.ones_like(self.masses)) / self.masses
        order = times.argsort()[: int((self.masses > 0).sum())].flip(0)
        left = torch.cat((times.new_zeros(1), self.masses[order].cumsum(0)[:-1]))
        self.queue = list(zip(order.tolist(), left.tolist(), strict=True))
        self.thinned = False


def _recursive(
    order: _Order, ask: Callable[[int], bool], cap: float, tail: float, patience: int, rest: Callable[[], Tensor] | None
) -> tuple[int, float]:
    rejects = 0
    while True:
        if rest is not None and (order.mass < tail or rejects >= patience):
            return _exact_rest(order, rest)
        before = order.mass
        token, mass = order.next()
        if ask(token):
            if order.mass <= 0 or rejects == cap - 1 or ask(order.next()[0]):
                return token, math.log(before)
            return token, math.log(mass)
        rejects += 1
        if order.mass <= 0 or rejects >= cap or (order.mass < tail and rest is None):
            return token, -math.inf


def _geometric(
    order: _Order, ask: Callable[[int], bool], draw: Draw, max_accepts: int, cap: float, tail: float
) -> tuple[int, float]:
    accepts, rejects = 0, 0
    result, token = -1, -1
    refused = False
    for _ in range(max_accepts):
        # A fresh order over what was not refused: what was accepted is back in it.
        while rejects < cap and order.mass > 0:
            left = order.mass
            token, mass = order.next()
            if refused:
                rejects += _repeats(left, draw, cap - rejects)
            if rejects >= cap:
                break
            if ask(token):
                accepts += 1
                result = token if result < 0 else result
                order.put_back(token, mass)
                break
            rejects += 1
            refused = True
            if order.mass < tail and accepts == 0:
                return token, -math.inf
    if accepts == 0:
        return token, -math.inf
    return result, math.log(min(max_accepts - 1, accepts) / (accepts + min(rejects, cap) - 1))


def _repeats(left: float, draw: Draw, most: float) -> int:
    """How many draws with replacement hit the rejected mass, 1 - `left`, before one does not: geometric.

    Highest digits first, so that a count that reaches `most` is known early; it is given as it stands then.
    """
    log_rejected = math.log1p(-left) if left < 1 else -math.inf
    digit = 1
    while 2 * digit * log_rejected > _IMPOSSIBLE:
        digit *= 2
    count = 0
    while digit and count < most:
        odds = math.exp(digit * log_rejected)
        count += digit * draw.bernoulli(odds / (1 + odds))
        digit //= 2
    return count


def _improper(
    order: _Order, ask: Callable[[int], bool], cap: float, tail: float, patience: int, rest: Callable[[], Tensor] | None
) -> tuple[int, float]:
    tried = 0
    token = -1
    while order.mass > 0 and tried < cap:
        if rest is not None and (order.mass < tail or tried >= patience):
            token, log_weight = _exact_rest(order, rest)
            return token, 0.0 if log_weight > -math.inf else log_weight
        token, _ = order.next()
        if ask(token):
            return token, 0.0
        tried += 1
    return token, -math.inf


def _exact_rest(order: _Order, rest: Callable[[], Tensor]) -> tuple[int, float]:
    allowed = rest().cpu()
    masses = torch.zeros_like(order.masses)
    masses[: len(allowed)] = order.masses[: len(allowed)] * allowed[: len(masses)]
    total = float(masses.sum())
    if total <= 0:
        return -1, -math.inf
    return order.draw.categorical(masses), math.log(total)
