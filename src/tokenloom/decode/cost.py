"""How long a forward over N nodes besides the last token of each row takes, measured, and how many are worth it.

A round over drafts of N nodes takes t(N) seconds and is expected to bring B + S(N) tokens for B rows; the N with the
most tokens a second is drafted. Where rows may have trees of their own sizes the likeliest nodes of all rows come
first; else every row pays for the largest tree. t is measured on the model's own session when a batch of that size
first occurs, kept as long as the model, and then follows the rounds themselves: drafting, verification and longer texts
included.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tokenloom.decode.session import ROOT, Session

SIZES = (*range(17), 20, 24, 28, 32, 40, 48, 64, 80, 112, 160, 224, 320, 448, 640)
"""Numbers of nodes that are thought of."""
_PROBED = (0, 1, 3, 6, 9, 13, 17, 24, 32, 48, 63)
"""Nodes that forwards are timed with: of all rows where rows may have trees of their own sizes, else of each."""
_SLOW = 0.05
"""Seconds of a plain step from which on each size is timed once, not twice: accidents are small beside it then."""
_DEAR = 3.0
"""Times a plain step: no drafts bring so many tokens a row that more is worth measuring."""
_SHORTER, _LONGER = 0.3, 0.1
"""How far an estimate follows a round that was quicker, or slower."""
_WORTH = 1.15
"""Times as many tokens a second as without drafts, below which there are none: t and S are estimates, and the chance
of a node that was chosen for it is rather smaller than it seemed."""


class CostCurve:
    """Seconds of a round of `rows` rows by number of nodes, from `probes` of forwards, which must begin with 0 nodes.

    Raises:
        ValueError: without a probe of 0 nodes.
    """

    def __init__(self, probes: dict[int, float], *, rows: int = 1) -> None:
        if 0 not in probes:
            raise ValueError("a cost curve begins with the time of a step without drafts; measure 0 nodes too")
        self.rows = rows
        self._sizes = sorted(probes)
        # More nodes never take less time; where they seemed to, the machine was busy with something else.
        least = float("inf")
        kept: list[float] = []
        for size in reversed(self._sizes):
            least = min(least, probes[size])
            kept.append(least)
        self._forwards = kept[::-1]
        # What rounds take besides, without drafts and with some: one number for all sizes, for what tells theirs apart
        # is mostly accident, and a size that seemed dear once would never be tried again.
        self._besides = [0.0, 0.0]
        self._known: set[int] = set()

    def for_fewer(self, rows: int) -> CostCurve:
        """The curve of a batch of fewer rows: a forward takes what one over as many tokens did."""
        # A size that was measured with more rows, and each that was.
        sizes = {0, *(n + self.rows - rows for n in self._sizes)}
        return CostCurve({n: self.forward(max(rows + n - self.rows, 0)) for n in sizes}, rows=rows)

    def forward(self, nodes: float) -> float:
        """Seconds of a forward over so many nodes besides the roots."""
        if len(self._sizes) == 1:
            return self._forwards[0] * (1 + nodes / self.rows)
        at = 1
        while at < len(self._sizes) - 1 and self._sizes[at] < nodes:
            at += 1
        (x0, x1), (y0, y1) = self._sizes[at - 1 : at + 1], self._forwards[at - 1 : at + 1]
        return y0 + (y1 - y0) * (nodes - x0) / (x1 - x0)

    @property
    def price(self) -> float:
        """Of a node among the first few, in tokens that a step without drafts would have brought in the time."""
        return (self.forward(8) - self.forward(0)) / 8 * self.rows / self.forward(0)

    def seconds(self, nodes: int) -> float:
        """Seconds of a whole round."""
        # Where forwards were measured as too long, what is besides may come out below zero.
        return max(self.forward(nodes) + self._besides[nodes > 0], 0.5 * self.forward(0))

    def knows(self, nodes: int) -> bool:
        """Whether rounds of about so many nodes were timed."""
        return _place(nodes) in self._known

    def note(self, nodes: int, seconds: float) -> None:
        """A round took so long."""
        held = self.seconds(nodes)
        self._besides[nodes > 0] = _followed(held, seconds, held) - self.forward(nodes)
        self._known.add(_place(nodes))


def _place(nodes: int) -> int:
    return bisect_left(SIZES, nodes)


def _followed(held: float, seen: float, most: float) -> float:
    """An estimate after one more time: times are too long by accident, such as other work, never too short.

    One is believed to be at most `most` longer.
    """
    weight = _SHORTER if seen < held else _LONGER
    return held + weight * min(seen - held, most)


def best_sizes(
    sums: Sequence[Sequence[float]],
    seconds: Callable[[int], float],
    most: int,
    *,
    ragged: bool,
    read: Callable[[int], int] = lambda n: n,
) -> list[int]:
    """The number of nodes of each row, up to `most`, with the most tokens a second of all; 0 when none are worth it.

    `sums[r][n]` is how many drafts of row r are expected to be accepted from its best n nodes; it grows ever more
    slowly, and a row with fewer nodes stays at its last sum. `read(n)` are the nodes to read for a tree of n, and
    `seconds(N)` a round takes that reads N of all rows. `ragged`: rows have sizes of their own.
    """
    rows = len(sums)
    choices = _own_sizes(sums, most) if ragged else _common_sizes(sums, most)
    best, chosen = rows / seconds(0) * _WORTH, [0] * rows
    for brought, sizes in choices:
        nodes = sum(map(read, sizes)) if ragged else rows * read(max(sizes))
        speed = (rows + brought) / seconds(nodes)
        if speed > best:
            best, chosen = speed, sizes
    return chosen


def _own_sizes(sums: Sequence[Sequence[float]], most: int) -> list[tuple[float, list[int]]]:
    """For each number of nodes in all, what the likeliest ones bring, and how many of each row these are."""
    gains = [(s[n] - s[n - 1], -row) for row, s in enumerate(sums) for n in range(1, min(len(s), most + 1))]
    gains.sort(reverse=True)
    brought = list(accumulate((gain for gain, _ in gains), initial=0.0))
    choices = []
    sizes, at = [0] * len(sums), 0
    for total in (*(size for size in SIZES[1:] if size < len(gains)), len(gains)):
        for _, row in gains[at:total]:
            sizes[-row] += 1
        at = total
        choices.append((brought[total], list(sizes)))
    return choices


def _common_sizes(sums: Sequence[Sequence[float]], most: int) -> list[tuple[float, list[int]]]:
    """For each number of nodes a row, what they bring in all."""
    sizes = [size for size in SIZES[1:] if size <= most]
    return [(sum(s[min(size, len(s) - 1)] for s in sums), [size] * len(sums)) for size in sizes]


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
    last = torch.tensor([row[-1] for row in session.rows])

    def seconds(nodes: int) -> float:
        # The nodes are dealt out to the rows where these need not be filled up, else each gets as many.
        counts = [1 + (nodes + row) // len(last) for row in range(len(last))] if session.ragged else None
        ids = last[:, None].repeat(1, 1 + nodes if counts is None else max(counts))
        parents = torch.full_like(ids, ROOT)
        parents[:, 1:] = 0
        started = _now(device)
        session.try_nodes(ids, parents, counts)
        return _now(device) - started

    times: dict[int, list[float]] = {}
    for nodes in _PROBED:
        found = times[nodes] = [seconds(nodes)]
        slow = found[0] > _SLOW and len(times) > 1
        if not slow and (len(times) == 1 or found[0] > _DEAR * min(times[0])):
            # The first call of a shape may also have chosen kernels.
            found.append(seconds(nodes))
        if min(found) > _DEAR * min(times[0]):
            break
    if min(times[0]) < _SLOW:
        # In turns, so that a moment in which the machine was slower is no size's own.
        for nodes, found in times.items():
            found.append(seconds(nodes))
    of_all = 1 if session.ragged else len(last)
    return CostCurve({nodes * of_all: min(found) for nodes, found in times.items()}, rows=len(last))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
