"""Beam search as a loop, with any objective of tokens in the place of the log-prob.

    model.generate(**inputs, custom_generate=decode.loop("beam-search", beams=5, returned=2))

`returned` rows come back for each prompt, its best beams (`generate` refuses `num_return_sequences` without its own
beams or sampling); after a call `scores` has their final scores. Processors act on log-probs, as in transformers' own
beam search, and what they give is summed as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Choice, Hypothesis, SearchLoop, best_first, segment_search
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.beam_search import EarlyStopping, best_continuations, may_stop, normalized_score


class Beams(SearchLoop):
    """Beams under any objective: subclasses write `totals`, and `monotone` if an objective may rise again."""

    name = "beam-search"
    monotone = True
    """Whether no continuation of a prefix has a larger objective than the prefix."""

    def __init__(self, beams: int, length_penalty: float, early_stopping: EarlyStopping, returned: int) -> None:
        """Raises ValueError for less than one beam, more to return than beams, or an unknown stopping rule."""
        if beams < 1 or not 1 <= returned <= beams:
            raise ValueError(f"{self.name}: needs 1 <= returned <= beams, got returned={returned}, beams={beams}")
        if early_stopping not in (True, False, "never"):
            raise ValueError(f"{self.name}: early_stopping is true, false or 'never', got {early_stopping!r}")
        self.beams, self.length_penalty, self.early_stopping = beams, length_penalty, early_stopping
        self.returned, self.scores = returned, list[float]()

    def totals(self, live: list[Hypothesis], logprobs: Tensor) -> Tensor:
        """The objective [N, V] of every continuation of `live`, whose tokens have `logprobs` [N, V]."""
        sums = torch.tensor([h.score for h in live], dtype=logprobs.dtype, device=logprobs.device)
        return sums[:, None] + logprobs

    def __call__(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Loop`.

        Raises:
            ValueError: for sampling, or `num_beams` (the loop has its own).
        """
        config = kwargs.get("generation_config", args[2] if len(args) > 2 else None)
        if getattr(config, "num_beams", 1) not in (None, 1):
            raise ValueError(f"{self.name}: give the loop its beams, loop({self.name!r}, beams=...), not num_beams")
        if getattr(config, "do_sample", False):
            raise ValueError(f"{self.name} draws nothing: pass do_sample=False (temperature 0)")
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].repeat_interleave(self.returned, 0)
        return super().__call__(model, input_ids.repeat_interleave(self.returned, 0), *args, **kwargs)

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`; the `returned` copies of a prompt get its best beams in order."""
        copies, whole = self.returned, run
        if copies > 1:
            whole = dataclasses.replace(run, prompts=run.prompts[::copies], input_ids=run.input_ids[::copies])
        best = [pool[i] for pool in self.search(whole) for i in range(min(copies, len(pool)))]
        if len(best) != len(run):
            raise ValueError(f"{self.name}: fewer than {copies} strings are possible; ask for fewer sequences")
        self.scores = [self._final(h) for h in best]
        run.stream(0, best[0].tokens[int(run.counts.pop("streamed", 0.0)) :])
        return [list(h.tokens) for h in best]

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """The finished beams of each prompt, best first."""
        looked_at = max(2, 1 + len(run.eos)) * self.beams
        totals: dict[tuple[int, tuple[int, ...]], float] = {}

        def propose(live: list[Hypothesis]) -> list[list[Choice]]:
            raw = wide(torch.stack([h.scores for h in live if h.scores is not None])).log_softmax(-1)
            logprobs = run.shaped([h.row for h in live], [h.tokens for h in live], raw)
            objective = self.totals(live, logprobs)
            best = best_continuations(objective, beams=looked_at)
            # The likeliest token's log-prob is noted: some objectives compare with it.
            notes = logprobs.max(-1).values.tolist()
            totals.clear()
            families = []
            table = zip(
                best.tolist(), objective.gather(1, best).tolist(), logprobs.gather(1, best).tolist(), strict=True
            )
            for h, note, (tokens, values, chances) in zip(live, notes, table, strict=True):
                able = [i for i, value in enumerate(values) if value > -torch.inf]
                families.append([Choice(tokens[i], chances[i], note) for i in able])
                totals.update({(h.row, (*h.tokens, tokens[i])): values[i] for i in able})
            return families

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            # Everything that is new has one length; what was finished before is shorter.
            length = max(len(h.tokens) for h in candidates)
            new = best_first([h for h in candidates if len(h.tokens) == length])[:looked_at]
            ended = [h for h in candidates if len(h.tokens) < length] + [h for h in new[: self.beams] if h.done]
            finished = sorted(ended, key=lambda h: -self._final(h))[: self.beams]
            running = [h for h in new if not h.done][: self.beams]
            if not running or self._enough(finished, running[0], run.limit):
                return finished
            return [*finished, *running]

        return segment_search(
            run,
            propose=propose,
            boundary=lambda h: True,
            score=lambda candidates: [totals[h.key] for h in candidates],
            select=select,
            width=self.beams,
        )

    def _final(self, h: Hypothesis) -> float:
        return normalized_score(h.score, len(h.tokens), length_penalty=self.length_penalty)

    def _enough(self, finished: list[Hypothesis], best: Hypothesis, limit: int) -> bool:
        if not self.monotone and self.early_stopping is not True:
            return False
        return may_stop(
            [self._final(h) for h in finished],
            best.score,
            len(best.tokens),
            limit,
            beams=self.beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )


@decoder("beam-search", kind="loop")
class BeamSearch(Beams):
    """Keep the `beams` most probable prefixes; gives the best finished strings by `sum log p / length^penalty`."""

    def __init__(
        self,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        returned: int = 1,
    ) -> None:
        """Raises ValueError as `Beams`."""
        super().__init__(beams, length_penalty, early_stopping, returned)
