"""When the large model is asked: a trained router, the entropy, or a rolling window of uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.decode.session import Session
from tokenloom.methods.decoding.r2r import Router, route, route_by_entropy
from tokenloom.methods.decoding.r2r_windows import no_window, route_by_window, uncertainty


class Asking(Protocol):
    """Decides for the live rows of one call, token by token."""

    reads_states: bool
    """Whether the small model's session must give hidden states."""

    def asks(self, small: Session, scores: Tensor, chosen: Sequence[int]) -> Tensor:
        """Which rows [B] ask, by the small model's raw scores [B, V] and its tokens [B]."""
        ...

    def branch(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        ...


class ByRouter:
    """Where a trained router's probability reaches `threshold`."""

    reads_states = True

    def __init__(self, router: Router, threshold: float) -> None:
        self.router, self.threshold = router, threshold

    def asks(self, small: Session, scores: Tensor, chosen: Sequence[int]) -> Tensor:
        """See `Asking`."""
        if not 0 < self.threshold <= 1:  # one of the two models alone
            return torch.full((len(scores),), self.threshold <= 0, device=scores.device)
        hidden = last_hidden(small, [len(row) for row in small.rows])
        top = scores.float().topk(self.router.shape["top"], -1).values
        device = self.router.combine.weight.device
        tokens = torch.tensor(list(chosen), device=device)
        with torch.no_grad():
            found = self.router.eval()(hidden.to(device), top.to(device), tokens)
        return route(found, threshold=self.threshold).to(scores.device)

    def branch(self, rows: Sequence[int]) -> None:
        """See `Asking`."""


class ByEntropy:
    """Where the entropy is above `threshold` nats."""

    reads_states = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def asks(self, small: Session, scores: Tensor, chosen: Sequence[int]) -> Tensor:
        """See `Asking`."""
        return route_by_entropy(scores.float(), threshold=self.threshold)

    def branch(self, rows: Sequence[int]) -> None:
        """See `Asking`."""


class ByWindow:
    """From where the uncertainty reaches `threshold` until its mean over the last `size` tokens is below it."""

    reads_states = False

    def __init__(self, rows: int, size: int, threshold: float, entropy: float, carry: bool) -> None:
        self.threshold, self.entropy, self.carry = threshold, entropy, carry
        self._window, self._asking = no_window(rows, size=size)

    def asks(self, small: Session, scores: Tensor, chosen: Sequence[int]) -> Tensor:
        """See `Asking`."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        entropies = torch.special.entr(wide.softmax(-1)).sum(-1)
        self._asking, self._window = route_by_window(
            uncertainty(wide)[0].to(self._window.device), entropies.to(self._window.device), self._window,
            self._asking, threshold=self.threshold, entropy=self.entropy, carry=self.carry,
        )  # fmt: skip
        return self._asking.to(scores.device)

    def branch(self, rows: Sequence[int]) -> None:
        """See `Asking`."""
        self._window, self._asking = self._window[list(rows)], self._asking[list(rows)]


def last_hidden(session: Session, lengths: Sequence[int]) -> Tensor:
    """The hidden states [B, D] of each row's last token, after the final norm, from the session's last forward."""
    states: Tensor = session.output.hidden_states[-1]  # type: ignore[attr-defined]  # of model sessions
    rows = [tuple(row) for row in session.rows]
    if states.shape[:2] == (len(rows), 1):
        return states[:, 0]
    # The forward of the prompts: each distinct one once, filled up on the right.
    distinct = list(dict.fromkeys(rows))
    at = torch.tensor([distinct.index(row) for row in rows], device=states.device)
    return states[at, torch.tensor(list(lengths), device=states.device) - 1]
