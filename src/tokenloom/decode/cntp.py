"""CNTP as a loop: where the model is uncertain, several trials up to the next punctuation, of which the surest stays.

model.generate(**inputs, do_sample=True, temperature=0.6, top_p=0.9,
               custom_generate=decode.loop("cntp", tokenizer=tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Choice, Hypothesis, SearchLoop, draws, segment_search
from tokenloom.methods.decoding.cntp import PUNCTUATION, most_confident, trials


@decoder("cntp", kind="loop")
class Cntp(SearchLoop):
    """Trials up to a punctuation mark, more of them the higher the entropy; the one of the best mean log-prob stays.

    A token is a mark when its text, spaces aside, ends with one; instead of a `tokenizer` the ids of `marks` may be
    given. `cap` bounds the tokens of a trial.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        marks: Sequence[int] | None = None,
        *,
        n_min: int = 1,
        n_max: int = 10,
        h_lo: float = 0.01,
        h_hi: float = 1.5,
        cap: int | None = None,
    ) -> None:
        """Raises ValueError for impossible numbers, or when neither tokenizer nor marks are given."""
        if tokenizer is None and marks is None:
            raise ValueError("cntp: trials end at punctuation: give tokenizer=..., or the ids marks=[...]")
        if cap is not None and cap < 1:
            raise ValueError(f"cntp: cap = {cap}; a trial has at least one token")
        self._settings: dict[str, Any] = {"n_min": n_min, "n_max": n_max, "h_lo": h_lo, "h_hi": h_hi}
        trials(torch.zeros(1), **self._settings)
        self._cap, self._tokenizer = cap, tokenizer
        self._known: dict[int, bool] = {} if marks is None else dict.fromkeys(marks, True)
        self._complete = marks is not None

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""

        single: set[int] = set()

        def propose(live: list[Hypothesis]) -> list[list[Choice]]:
            scores = torch.stack([h.scores for h in live if h.scores is not None])
            laws = run.shaped([h.row for h in live], [h.tokens for h in live], scores).softmax(-1)
            counts = trials(torch.special.entr(laws).sum(-1), **self._settings).tolist()
            run.counts["trials"] = run.counts.get("trials", 0.0) + sum(counts)
            single.clear()
            single.update(h.row for h, n in zip(live, counts, strict=True) if n == 1)
            return draws(run, live, counts)

        def boundary(h: Hypothesis) -> bool:
            length = len(h.tokens) - h.begin
            # A single draw is committed token by token: the next law may be uncertain again.
            return h.row in single or self._ends(h.tokens[-1]) or length == self._cap

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            return [candidates[most_confident([h.logprobs[h.begin :] for h in candidates])]]

        return segment_search(
            run,
            propose=propose,
            boundary=boundary,
            score=lambda candidates: [0.0] * len(candidates),
            select=select,
            width=1,
        )

    def _ends(self, token: int) -> bool:
        if token not in self._known:
            if self._complete:
                return False
            text = self._tokenizer.decode([token])
            self._known[token] = text.strip(" ")[-1:] in PUNCTUATION
        return self._known[token]
