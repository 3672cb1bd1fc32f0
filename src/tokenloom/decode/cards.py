"""CARDS as a loop: segments of a sampled response are accepted or drawn again by their reward.

    model.generate(**inputs, do_sample=True, temperature=0.7, top_k=40,
                   custom_generate=decode.loop("cards", reward=score, tokenizer=tokenizer, target=8.5))

`target` is on the scale of the reward: what a good whole answer earns. The release samples at temperature beta from
the 40 likeliest tokens; here the settings of `generate` say how to sample. After `max_tries` rejections the best of
the segments seen is taken (the release draws one more); the length limit also ends a segment, as does an end token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokenloom.decode.registry import decoder
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis, SearchLoop, draws, segment_search
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.cards import acceptance, reward_threshold


@decoder("cards", kind="loop")
class Cards(SearchLoop):
    """Reject segments whose reward falls behind what the way to `target` expects (see `tokenloom.decode.rewards`)."""

    def __init__(
        self,
        reward: Any,
        tokenizer: Any = None,
        *,
        target: float = 8.5,
        alpha: float = 0.5,
        beta: float = 0.7,
        entropy_threshold: float = 3.0,
        min_segment: int = 4,
        max_segment: int = 64,
        max_tries: int = 20,
        accept: Literal["soft", "hard"] = "soft",
    ) -> None:
        """Raises ValueError for impossible numbers or an unusable reward."""
        if not 1 <= min_segment <= max_segment or max_tries < 1:
            raise ValueError(
                f"cards: needs 1 <= min_segment <= max_segment and max_tries >= 1; got {min_segment}, {max_segment} "
                f"and {max_tries}"
            )
        if accept not in ("soft", "hard"):
            raise ValueError(f"cards: accept is 'soft' or 'hard', got {accept!r}")
        acceptance(0.0, 0.0, beta=beta)
        reward_threshold(0.0, 0, 1, target=target, alpha=alpha)
        self._reward = reward_of("cards", reward, tokenizer)
        self._scale: dict[str, Any] = {"target": target, "alpha": alpha}
        self._test: dict[str, Any] = {"beta": beta, "accept": accept}
        self._entropy, self._lengths, self._tries = entropy_threshold, (min_segment, max_segment), max_tries

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""
        starts = self._reward(run, [Hypothesis(row) for row in range(len(run))])
        tried = [0] * len(run)
        best: list[Hypothesis | None] = [None] * len(run)
        # Without sampling every try is the same.
        most = self._tries if run.sample else 1

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            [h] = candidates
            threshold = reward_threshold(starts[h.row], len(h.tokens), run.limit, **self._scale)
            known = best[h.row]
            best[h.row] = known if known is not None and known.score >= h.score else h
            tried[h.row] += 1
            accepted = run.draw.bernoulli(acceptance(h.score, threshold, **self._test))
            if not accepted and tried[h.row] < most:
                run.counts["rejected"] = run.counts.get("rejected", 0.0) + 1
                assert h.parent is not None
                return [h.parent]
            taken = h if accepted else best[h.row]
            tried[h.row], best[h.row] = 0, None
            assert taken is not None
            return [taken]

        return segment_search(
            run,
            propose=lambda live: draws(run, live, [1] * len(live)),
            boundary=self._ends,
            score=lambda candidates: self._reward(run, candidates),
            select=select,
            width=1,
            ahead=True,
        )

    def _ends(self, h: Hypothesis) -> bool:
        length, (least, most) = len(h.tokens) - h.begin, self._lengths
        if length < least:
            return False
        assert h.scores is not None
        return length >= most or float(torch.special.entr(wide(h.scores).softmax(-1)).sum()) >= self._entropy
