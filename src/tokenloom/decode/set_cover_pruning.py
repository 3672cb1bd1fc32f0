"""Self-consistency with early pruning as a loop: parallel responses, thinned out by a set cover of their token types.

    model.generate(**inputs, do_sample=True, custom_generate=decode.loop(
        "set-cover-pruning", answer=lambda text: text.split()[-1], tokenizer=tokenizer, n=16))

`answer(text)` gives what a response votes for, or None; without a tokenizer it is given the new ids instead. Without
`answer` the whole response is the vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Choice, Hypothesis, SearchLoop, draws, segment_search
from tokenloom.methods.decoding.self_consistency import majority
from tokenloom.methods.decoding.set_cover_pruning import set_cover

Answer = Callable[[Any], Hashable]


@decoder("set-cover-pruning", kind="loop")
class SetCoverPruning(SearchLoop):
    """`n` responses in parallel; every `every` tokens those stay that cover the types of all; then the majority's."""

    def __init__(
        self,
        answer: Any = None,
        tokenizer: Any = None,
        *,
        n: int = 16,
        every: int = 500,
        coverage: float = 0.95,
        survivors: int = 1,
    ) -> None:
        """Raises ValueError for impossible numbers."""
        if n < 1 or every < 1:
            raise ValueError(f"set-cover-pruning: n and every must be at least 1, got {n} and {every}")
        self._cover: dict[str, Any] = {"coverage": coverage, "survivors": survivors}
        set_cover(torch.ones(1, 1, dtype=torch.bool), torch.ones(1), **self._cover)
        self._answer: Answer | None = answer
        self._tokenizer, self.n, self.every = tokenizer, n, every

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""

        def propose(live: list[Hypothesis]) -> list[list[Choice]]:
            return draws(run, live, [1 if h.tokens else self.n for h in live])

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            live = [h for h in candidates if not h.done]
            if not live:
                return candidates
            ids = sorted({t for h in live for t in h.tokens})
            column = {t: i for i, t in enumerate(ids)}
            types = torch.zeros(len(live), len(ids), dtype=torch.bool)
            for i, h in enumerate(live):
                types[i, [column[t] for t in h.tokens]] = True
            confidence = torch.tensor([math.exp(sum(h.notes) / len(h.notes)) for h in live], dtype=torch.float64)
            keep = set_cover(types, confidence.clamp(min=1e-300), **self._cover).tolist()
            dropped = {id(h) for h, stays in zip(live, keep, strict=True) if not stays}
            run.counts["pruned"] = run.counts.get("pruned", 0.0) + len(dropped)
            return [h for h in candidates if id(h) not in dropped]

        return segment_search(
            run,
            propose=propose,
            boundary=lambda h: len(h.tokens) - h.begin >= self.every,
            score=lambda candidates: [0.0] * len(candidates),
            select=select,
            width=self.n,
        )

    def answer(self, run: Run, pool: list[Hypothesis]) -> Hypothesis:
        """The first response that gives the majority's answer."""
        return pool[majority([self._voted(h) for h in pool])]

    def _voted(self, h: Hypothesis) -> Hashable:
        if self._answer is None:
            return h.tokens
        if self._tokenizer is None:
            return self._answer(list(h.tokens))
        return self._answer(self._tokenizer.decode(list(h.tokens), skip_special_tokens=True))
