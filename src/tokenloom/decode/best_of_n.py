"""Best-of-N as a loop: N whole responses, of which the reward takes one.

model.generate(**inputs, do_sample=True,
               custom_generate=decode.loop("best-of-n", reward=score, tokenizer=tokenizer, n=8))
"""

from __future__ import annotations

from typing import Any

from tokenloom.decode.registry import decoder
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis, SearchLoop, draws, segment_search
from tokenloom.methods.decoding.best_of_n import best_of_n


@decoder("best-of-n", kind="loop")
class BestOfN(SearchLoop):
    """Sample `n` responses and return the one of the largest `reward` (see `tokenloom.decode.rewards`)."""

    def __init__(self, reward: Any, tokenizer: Any = None, *, n: int = 16) -> None:
        """Raises ValueError for n < 1 or an unusable reward."""
        if n < 1:
            raise ValueError(f"best-of-n: n = {n}; at least one response is needed")
        self.n, self._reward = n, reward_of("best-of-n", reward, tokenizer)

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""
        return segment_search(
            run,
            propose=lambda live: draws(run, live, [self.n] * len(live)),
            boundary=lambda h: False,
            score=lambda candidates: self._reward(run, candidates),
            select=lambda candidates: [candidates[best_of_n([h.score for h in candidates])]],
            width=1,
        )
