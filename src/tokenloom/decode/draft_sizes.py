"""How many tokens speculative decoding drafts for each row, round by round: as many as pay, and none for a while after
none have paid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenloom.decode.cost import CostCurve, best_sizes, curve_for
from tokenloom.decode.drafters.base import NOTHING, Drafter, Round
from tokenloom.decode.drafters.best_first import Grown, Limits
from tokenloom.decode.drafters.shapes import Chances, Shape
from tokenloom.decode.run import Run
from tokenloom.decode.session import Session

MOST = 80
"""Nodes of a tree."""
_PAUSES = (8, 128)
"""Rounds without drafts before a few are tried again: at first, and at most."""
_AFRESH = 4
"""By how much a pause is shorter at the beginning of another call."""
_LEARNED = 8
"""Of rounds in such a pause, each eighth is learned from by a drafter that can do without the others."""
_LONG = 16
"""Rounds of such a pause from which on drafts are thought of in each eighth round only."""
_TRIED = 2
_PLAIN_EVERY = 32
"""Rounds with drafts after which one without shows again what that takes."""


class Sizes:
    """Decides on the shapes of a round's drafts, and learns what they cost and brought."""

    def __init__(
        self,
        run: Run,
        session: Session,
        drafter: Drafter,
        chances: Chances,
        fixed: Shape | None,
        nodes: int | None,
        pauses: dict[int, int] | None = None,
    ) -> None:
        """`pauses` remembers, from call to call, how long drafts were last left alone in batches of a size."""
        self._run, self._session, self._drafter, self._chances = run, session, drafter, chances
        self._fixed, self._nodes = fixed, nodes
        self._pauses, self._batch = {} if pauses is None else pauses, (len(run) - 1).bit_length()
        # Other texts may be easier.
        self._pause = max(self._pauses.get(self._batch, 0) // _AFRESH, _PAUSES[0])
        self._waited, self._drafted, self._turn = 0, 0, 0
        self._curve: CostCurve | None = None
        self._measured = 0
        self._keys: list[int | None] = []
        self._grown: list[Grown | None] = []

    @property
    def resting(self) -> bool:
        """Whether this round is one of those that need not be learned from."""
        return self._waited % _LEARNED != 0

    def rests(self) -> bool:
        """Whether drafts are not even thought of: they have not paid for long."""
        if self._pause <= _LONG or not self._drafter.misses or (self._waited + 1) % _LEARNED == 0:
            return False
        self._waited += 1
        return True

    @property
    def limits(self) -> Limits:
        """Of trees that grow by themselves."""
        return Limits(self._nodes, 0.0 if self._curve is None else 0.5 * self._curve.price)

    def shapes(self, keys: list[int | None], grown: list[Grown | None], rooms: Sequence[int]) -> list[Shape]:
        """For rows whose drafts have `keys`, or were `grown`, and that can still take `rooms` tokens of them."""
        self._keys = [key if room > 0 else None for key, room in zip(keys, rooms, strict=True)]
        self._grown = grown
        if all(key is None for key in self._keys):
            return [NOTHING] * len(keys)
        sizes = self._decided()
        return [
            NOTHING if key is None or not size else self._shape(key, own, size, room)
            for key, own, size, room in zip(self._keys, grown, sizes, rooms, strict=True)
        ]

    def _shape(self, key: int, grown: Grown | None, size: int, room: int) -> Shape:
        if self._fixed is not None:
            return self._fixed.cut(room)
        if grown is not None:
            return grown.shape.first(size).cut(room)
        return self._chances.shape(key, size, room)

    def _sums(self, key: int | None, grown: Grown | None) -> list[float]:
        if key is None:
            return [0.0]
        return self._chances.sums(key) if grown is None else grown.sums

    def _decided(self) -> list[int]:
        """The number of nodes of each row."""
        rows = len(self._keys)
        if self._fixed is not None:
            return [len(self._fixed)] * rows
        if self._nodes is not None:
            return [self._nodes] * rows
        curve = self._current_curve()
        if not curve.knows(0) or self._drafted >= _PLAIN_EVERY:
            self._drafted = 0
            return [0] * rows
        sums = [self._sums(key, grown) for key, grown in zip(self._keys, self._grown, strict=True)]
        sizes = best_sizes(sums, curve.seconds, MOST, ragged=self._session.ragged, read=self._read)
        if any(sizes):
            self._pause, self._waited = _PAUSES[0], 0
            self._pauses[self._batch] = self._pause
            self._drafted += 1
            return sizes
        # What is never drafted is never found to come true.
        self._waited += 1
        if self._waited < self._pause:
            return sizes
        self._pause, self._waited = min(2 * self._pause, _PAUSES[1]), 0
        self._pauses[self._batch] = self._pause
        if not self._session.ragged:
            return [_TRIED] * rows
        # One row tells as much, and the others do not pay for it.
        self._turn += 1
        return [_TRIED if row == self._turn % rows else 0 for row in range(rows)]

    def _read(self, drafts: int) -> int:
        """The number of nodes that are read for a tree of `drafts`."""
        return drafts + self._drafter.probed(drafts)

    def _current_curve(self) -> CostCurve:
        rows = len(self._session.rows)
        size = (rows - 1).bit_length()
        if self._curve is None:
            self._curve = curve_for(self._run.model, self._session, self._device)
        elif size != self._measured:
            # Rows have ended; to measure again would take longer than the rest does.
            self._curve = self._curve.for_fewer(rows)
        self._measured = size
        return self._curve

    @property
    def _device(self) -> torch.device:
        return self._run.input_ids.device

    def note(self, rounds: Sequence[Round], nodes: int, seconds: float) -> None:
        """What became of the drafts, and how long the round took that read so many nodes besides the roots."""
        for done, key, grown in zip(rounds, self._keys, self._grown, strict=True):
            if key is not None and grown is None and len(done.tree):
                self._chances.note(key, done.tree, done.path)
        if self._curve is not None and (len(rounds) - 1).bit_length() == self._measured:
            self._curve.note(nodes, seconds)
