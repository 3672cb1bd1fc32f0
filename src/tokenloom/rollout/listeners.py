"""Who is told what of a decode while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tokenloom.rollout.record import Response

Progress = Callable[[int, int, int], None]
OnTokens = Callable[[int, list[int]], None]
OnFinished = Callable[[int, Response], None]


@dataclass(frozen=True)
class Listeners:
    """Called after every step of a wave, in this order: `tokens`, `finished`, `progress`; see `engine.generate`.

    `rows` is the number of rows of the whole call, of which `before` came in earlier waves, with `sampled` tokens.
    """

    rows: int
    progress: Progress | None = None
    on_tokens: OnTokens | None = None
    on_finished: OnFinished | None = None
    before: int = 0
    sampled: int = 0

    def behind(self, responses: Sequence[Response]) -> Listeners:
        """The same listeners, for a wave after `responses`."""
        return replace(self, before=len(responses), sampled=sum(len(r.tokens) for r in responses))

    def tokens(self, row: int, ids: list[int]) -> None:
        """Row `row` of the wave has got `ids`."""
        if self.on_tokens is not None:
            self.on_tokens(self.before + row, ids)

    def finished(self, row: int, response: Response) -> None:
        """Row `row` of the wave is `response`."""
        if self.on_finished is not None:
            self.on_finished(self.before + row, response)

    def step(self, finished: int, tokens: int) -> None:
        """So many rows of the wave have finished, and so many tokens have been sampled in it."""
        if self.progress is not None:
            self.progress(self.before + finished, self.rows, self.sampled + tokens)
