"""Context cutoff in `generate`: a context is read in chunks, and only until a gauge finds it sufficient.

gauge = context_gauge.fit(model, samples)
loop = decode.loop("context-cutoff", gauge=gauge, spans=[(begin, end)])    # where the context lies in each prompt
model.generate(**inputs, custom_generate=loop)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.context_gauge import Gauge, SelfPrompt
from tokenloom.decode.hidden_states import head_outputs
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import Session, open_session
from tokenloom.methods.decoding.context_cutoff import chunk_ends


@decoder("context-cutoff", kind="loop")
class ContextCutoff(Loop):
    """Read each prompt's context in chunks until a gauge finds it sufficient, then decode from that cache.

    `spans` holds (begin, end) of the context in each prompt's own ids; what comes before is read first, what comes
    after is read once the context is cut. `gauge` is a `Gauge`, the path of its file, a `SelfPrompt`, or any function
    of heads' outputs [1, L, H, E] that gives [1]. `threshold` 0 takes the gauge's own; above 1 the whole context is
    read. Processors see the whole prompt, also what the model did not read.
    """

    def __init__(self, gauge: Any, spans: Any, *, chunks: int = 10, threshold: float = 0.0) -> None:
        """Raises ValueError for chunks < 1, or threshold 0 with a gauge that has none of its own."""
        if chunks < 1:
            raise ValueError(f"context-cutoff needs chunks >= 1, got {chunks}")
        self._gauge = Gauge.load(gauge) if isinstance(gauge, str | Path) else gauge
        self._spans, self._chunks = [(int(a), int(b)) for a, b in spans], chunks
        self.threshold = threshold if threshold != 0 else getattr(self._gauge, "threshold", None)
        if self.threshold is None:
            raise ValueError("context-cutoff: this gauge has no threshold of its own; give threshold=...")
        self.read: list[int] = []
        """How many context tokens each row of the last call read."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        if len(self._spans) != len(run):
            raise ValueError(f"context-cutoff got {len(self._spans)} spans for {len(run)} prompts; give one for each")
        self.read = []
        generated = [self._row(run, row) for row in range(len(run))]
        whole = sum(end - begin for begin, end in self._spans)
        run.counts["context_read"] = sum(self.read) / whole
        return generated

    def _row(self, run: Run, row: int) -> list[int]:
        prompt, (begin, end) = run.prompts[row], self._spans[row]
        if not 0 <= begin < end <= len(prompt):
            raise ValueError(
                f"context-cutoff: the span ({begin}, {end}) is not inside the prompt of {len(prompt)} tokens"
            )
        assert self.threshold is not None
        ends = [begin + e for e in chunk_ends(end - begin, chunks=self._chunks)]
        generated: list[int] = []
        with head_outputs(run.model) as last, _session(run.model, prompt[: ends[0]]) as session:
            scores, read = session.start(), ends[0]
            while read < end and self._confidence(session, last) < self.threshold:
                following = ends[ends.index(read) + 1]
                scores = session.extend([prompt[read:following]])
                read = following
            self.read.append(read - begin)
            if end < len(prompt):
                scores = session.extend([prompt[end:]])
            while True:
                [token] = run.choose([row], [generated], scores)
                _, stopped = run.until_stop(row, generated, [token])
                generated.append(token)
                run.stream(row, [token])
                if stopped:
                    return generated
                scores = session.step(torch.tensor([token]))

    def _confidence(self, session: Session, last: Callable[[], Tensor]) -> float:
        if not isinstance(self._gauge, SelfPrompt):
            return float(self._gauge(last()[:, -1]))
        read = len(session.rows[0])
        scores = session.extend([self._gauge.ask])
        session.crop([read])
        return self._gauge.confidence(scores)


def _session(model: Any, prompt: Sequence[int]) -> AbstractContextManager[Session]:
    # Lean forms of modules would not show what the heads give: an option keeps them off.
    return open_session(model, [prompt], output_attentions=False)
