"""How long a forward over 1 + n nodes a row takes, measured, and how many nodes are worth it.

A round over drafts of n nodes takes t(n) seconds and is expected to bring B + S(n) tokens for B rows; the n with the
most tokens a second is drafted. t is measured on the model's own session when a batch of that size first occurs, kept
as long as the model, and then follows the rounds themselves: drafting, verification and longer texts included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tokenloom.decode.session import ROOT, Session

SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80)
"""Nodes besides the root that a tree may have."""
_PROBED = (0, 1, 3, 7, 15, 31, 63)
_REPEATS = 2
_DEAR = 3.0
"""Times a plain step: no drafts bring so many tokens a row that more is worth measuring."""
_SHORTER, _LONGER = 0.3, 0.1
"""How far an estimate follows a round that was quicker, or slower."""
_WORTH = 1.03
"""Times as many tokens a second as without drafts, below which there are none: t and S are estimates."""


class CostCurve:
    """Seconds of a round by number of nodes, from `probes` of forwards, which must begin with 0 nodes.

    Raises:
        ValueError: without a probe of 0 nodes.
    """

    def __init__(self, probes: dict[int, float]) -> None:
        if 0 not in probes:
            raise ValueError("a cost curve begins with the time of a step without drafts; measure 0 nodes too")
        self._sizes = sorted(probes)
        # More nodes never take less time; where they seemed to, the machine was busy with something else.
        least = float("inf")
        kept: list[float] = []
        for size in reversed(self._sizes):
            least = min(least, probes[size])
            kept.append(least)
        self._forwards = kept[::-1]
        self._rounds: dict[int, float] = {}
        self._beside = 0.0

    def for_fewer(self, share: float) -> CostCurve:
        """The curve of a batch of this share of the rows: a forward takes what one over as many tokens did."""
        return CostCurve({nodes: self.forward(max(share * (1 + nodes) - 1, 0.0)) for nodes in _PROBED})

    def forward(self, nodes: float) -> float:
        """Seconds of a forward over so many nodes besides the root."""
        if len(self._sizes) == 1:
            return self._forwards[0] * (1 + nodes)
        at = 1
        while at < len(self._sizes) - 1 and self._sizes[at] < nodes:
            at += 1
        (x0, x1), (y0, y1) = self._sizes[at - 1 : at + 1], self._forwards[at - 1 : at + 1]
        return y0 + (y1 - y0) * (nodes - x0) / (x1 - x0)

    def seconds(self, nodes: int) -> float:
        """Seconds of a whole round."""
        found = self._rounds.get(nodes)
        if found is not None:
            return found
        return self.forward(nodes) + (self._beside if nodes else 0.0)

    def knows(self, nodes: int) -> bool:
        """Whether rounds of so many nodes were timed."""
        return nodes in self._rounds

    def note(self, nodes: int, seconds: float) -> None:
        """A round took so long."""
        if nodes:
            self._beside = _followed(self._beside, max(seconds - self.forward(nodes), 0.0), self.forward(0))
        held = self.seconds(nodes)
        self._rounds[nodes] = _followed(held, seconds, held)


def _followed(held: float, seen: float, most: float) -> float:
    """An estimate after one more time: times are too long by accident, such as other work, never too short.

    One is believed to be at most `most` longer.
    """
    weight = _SHORTER if seen < held else _LONGER
    return held + weight * min(seen - held, most)


def best_size(sums: Sequence[Sequence[float]], seconds: Callable[[int], float], most: int) -> int:
    """The number of nodes of `SIZES`, up to `most`, with the most tokens a second.

    `sums[r][n]` is how many drafts of row r are expected to be accepted from n nodes; a row with fewer nodes stays
    at its last sum.
    """
    rows = len(sums)
    plain = rows / seconds(0)
    best, nodes = plain * _WORTH, 0
    for size in SIZES[1:]:
        if size > most:
            break
        speed = (rows + sum(s[min(size, len(s) - 1)] for s in sums)) / seconds(size)
        if speed > best:
            best, nodes = speed, size
    return nodes


_curves: WeakKeyDictionary[Any, dict[tuple[Any, ...], CostCurve]] = WeakKeyDictionary()


def curve_for(model: Any, session: Session, device: torch.device) -> CostCurve:
    """The curve of `model` for as many rows as `session` has (the next power of two), measured on it if there is none.

    Nothing is committed. The session must have been started.
    """
    rows = len(session.rows)
    # Rounded up: some rows that ended ask for no measurement.
    size = 1 << (rows - 1).bit_length()
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    key = (size, device, autocast, torch.get_num_threads())
    held = _curves.setdefault(model, {})
    if key not in held:
        held[key] = measure(session, device)
    return held[key]


def measure(session: Session, device: torch.device) -> CostCurve:
    """Time forwards of more and more nodes, until they cost some plain steps."""
    probes: dict[int, float] = {}
    last = [row[-1] for row in session.rows]
    for nodes in _PROBED:
        ids = torch.tensor(last)[:, None].repeat(1, 1 + nodes)
        parents = torch.full_like(ids, ROOT)
        parents[:, 1:] = 0
        times = []
        # The first call of a shape also chooses kernels.
        for _ in range(_REPEATS):
            started = _now(device)
            session.try_nodes(ids, parents)
            times.append(_now(device) - started)
        probes[nodes] = min(times)
        if probes[nodes] > _DEAR * probes[0]:
            break
    return CostCurve(probes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
