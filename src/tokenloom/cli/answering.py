"""How `tokenloom generate` answers: by the engine that rollouts use, or by decoding methods; some prompts at a time."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokenloom.cli.decoding import decoding_of
from tokenloom.cli.guard import UsageError
from tokenloom.cli.models import load_policy
from tokenloom.cli.prompts import Question, encoded, room

if TYPE_CHECKING:
    from tokenloom.batch import Sampling
    from tokenloom.decode.constraints import Written

Show = Callable[[str], None]
Report = Callable[[int, int, int], None]
_ROWS = 64


@dataclass(frozen=True)
class Asked:
    """A call's prompts and how to answer them; `sampling` has a seed."""

    model: str
    questions: list[Question]
    sampling: Sampling
    copies: int
    system: str | None
    raw: bool
    shorten: bool
    """Whether the longest response gives way to a small model's limit, since nobody asked for it."""


class Answers(ABC):
    """A loaded model that answers `together` prompts at a time, the last ones perhaps fewer."""

    together: int

    def __init__(self, asked: Asked) -> None:
        self.policy = load_policy(asked.model)
        self.ids = encoded(self.policy, [q.prompt for q in asked.questions], system=asked.system, raw=asked.raw)
        limit = room(self.policy, self.ids, asked.sampling.max_tokens, shorten=asked.shorten)
        self.asked, self.sampling = asked, replace(asked.sampling, max_tokens=limit)
        self.seconds, self.tokens = 0.0, 0

    @abstractmethod
    def lines(self, begin: int, report: Report, show: Show | None) -> list[dict[str, Any]]:
        """The answers to the prompts from `begin` on."""

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While all is answered: what would else be prepared for each call of `lines`."""
        yield

    def notes(self) -> list[str]:
        """What the methods did."""
        return []

    def _line(self, prompt: int, ids: list[int], truncated: bool, logprob: float) -> dict[str, Any]:
        question = self.asked.questions[prompt]
        named = {} if question.id is None else {"id": question.id}
        text = self.policy.tokenizer.decode(ids, skip_special_tokens=True)
        line = {"prompt": question.prompt, "response": text, "tokens": len(ids), "truncated": truncated}
        return {**named, **line, "logprob": round(logprob, 4)}


class Sampled(Answers):
    """By the engine that rollouts use."""

    def __init__(self, asked: Asked) -> None:
        from tokenloom.rollout.record import Request

        super().__init__(asked)
        self.together = max(_ROWS // asked.copies, 1)
        seen: Counter[tuple[int, ...]] = Counter()
        self._requests = []
        for prompt in map(tuple, self.ids):
            for _ in range(asked.copies):
                # A prompt that comes twice is answered in two ways.
                self._requests.append(Request(prompt, seen[prompt], self.sampling.max_tokens))
                seen[prompt] += 1

    @contextmanager
    def ready(self) -> Iterator[None]:
        """See `Answers`."""
        from tokenloom.rollout.contexts import sampling_mode
        from tokenloom.rollout.forward import base_model
        from tokenloom.rollout.lean import lean_modules

        with sampling_mode(self.policy), lean_modules(base_model(self.policy.model), in_chunks=True):
            yield

    def lines(self, begin: int, report: Report, show: Show | None) -> list[dict[str, Any]]:
        """See `Answers`."""
        from tokenloom.decode.respond import text_pieces
        from tokenloom.rollout.engine import sample

        piece = text_pieces(self.policy.tokenizer)
        n, started = self.asked.copies, time.monotonic()
        assert self.sampling.seed is not None
        found = sample(
            self.policy, self._requests[begin * n : (begin + self.together) * n], self.sampling, self.sampling.seed,
            progress=report, max_rows=_ROWS,
            on_tokens=None if show is None else lambda _row, new: show(piece(new)),
        )  # fmt: skip
        self.seconds += time.monotonic() - started
        self.tokens += sum(len(r.tokens) for r in found)
        return [
            self._line(begin + i // n, r.tokens.tolist(), r.truncated, float(r.logprobs.sum()))
            for i, r in enumerate(found)
        ]


class Decoded(Answers):
    """By the loops and processors of `decode`."""

    def __init__(self, asked: Asked, methods: str, draft: str | None, constraint: Written | None) -> None:
        super().__init__(asked)
        self.decoding = decoding_of(self.policy, methods, draft, self.sampling, constraint)
        rows = self.decoding.batch if getattr(self.decoding.loop, "batches", True) else 1
        # The fewest prompts whose answers fill all batches.
        self.together = rows // math.gcd(rows, asked.copies)
        self._counts: Counter[str] = Counter()

    def lines(self, begin: int, report: Report, show: Show | None) -> list[dict[str, Any]]:
        """See `Answers`."""
        from tokenloom.decode.respond import respond, text_pieces

        piece, shown = text_pieces(self.policy.tokenizer), False

        def stream(new: list[int]) -> None:
            nonlocal shown
            shown = True
            if show is not None:
                show(piece(new))

        assert self.sampling.seed is not None
        try:
            found = respond(
                self.policy, self.ids[begin : begin + self.together], self.decoding, copies=self.asked.copies,
                seed=_seed(self.sampling.seed, begin), progress=report, on_tokens=None if show is None else stream,
            )  # fmt: skip
        except ValueError as error:  # a loop refuses what it is given
            raise UsageError(str(error)) from None
        self.seconds += found.seconds
        self.tokens += found.tokens
        # A mean over laws, of which there is one for about every token.
        self._counts.update(found.counts | {"kept": found.counts.get("kept", 0.0) * found.tokens})
        lines = []
        for a in found.answers:
            judged = {} if a.standing is None else {"constraint": a.standing}
            lines.append({**self._line(begin + a.prompt, a.ids, a.truncated, a.logprob * len(a.ids)), **judged})
        if show is not None and not shown:  # loops that decide late do not stream
            show(lines[0]["response"])
        return lines

    def notes(self) -> list[str]:
        """See `Answers`."""
        found = []
        if self._counts["kept"]:
            found.append(f"{self._counts['kept'] / self.tokens:,.1f} words left to choose from")
        if self._counts["drafted"]:
            # Every token that was not drafted is what one row got from one forward.
            own = max(self.tokens - self._counts["accepted"], 1)
            found.append(f"{self.tokens / own:.2f} tokens a forward for each response")
            found.append(f"{self._counts['accepted'] / self._counts['drafted']:.0%} of drafts accepted")
        return found


def _seed(seed: int, begin: int) -> int:
    """A seed for the prompts from `begin` on, the first ones' being `seed` itself."""
    if begin == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{begin}".encode(), digest_size=7).digest())
