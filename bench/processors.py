"""What a logits processor costs a token: one call on scores [B, V], ours and transformers' own of the same name.

Scores are random normals of deviation 3 in float32. A call is the mean of `CALLS` in a row; a forward of a small model
takes some ten milliseconds beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.child import Turns
from bench.harness import Metric, Row, Side, Table, main

CALLS = 20
SIZES = ((1, 49152), (8, 49152), (1, 151936), (8, 151936))
NAMES = ("temperature", "top-k", "top-p", "min-p", "epsilon-sampling", "eta-sampling", "locally-typical", "top-h",
         "green-list-watermark")  # fmt: skip


def ours(name: str) -> Callable[[Any, Any], Any]:
    """Tokenloom's processor."""
    from tokenloom import decode

    return decode.shaper(name)


def theirs(name: str) -> Callable[[Any, Any], Any]:
    """The processor of transformers with the same parameters."""
    import transformers as t
    from transformers.generation.logits_process import TopHLogitsWarper

    made: dict[str, Callable[[], Any]] = {
        "temperature": lambda: t.TemperatureLogitsWarper(1.3),
        "top-k": lambda: t.TopKLogitsWarper(50),
        "top-p": lambda: t.TopPLogitsWarper(0.9),
        "min-p": lambda: t.MinPLogitsWarper(0.1),
        "epsilon-sampling": lambda: t.EpsilonLogitsWarper(3e-4),
        "eta-sampling": lambda: t.EtaLogitsWarper(3e-4),
        "locally-typical": lambda: t.TypicalLogitsWarper(0.95),
        "top-h": lambda: TopHLogitsWarper(0.4),
    }
    return made[name]()  # type: ignore[no-any-return]  # transformers is untyped here


def measured(turns: Turns, *, side: str, name: str, rows: int, vocabulary: int) -> None:
    """The mean time of a call."""
    import torch

    processor = ours(name) if side == "tokenloom" else theirs(name)
    scores = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(vocabulary, (rows, 8), generator=torch.Generator().manual_seed(1))
    processor(ids, scores.clone())
    for _ in turns:
        copies = [scores.clone() for _ in range(CALLS)]
        started = time.perf_counter()
        for copy in copies:
            processor(ids, copy)
        turns.report(microseconds=1e6 * (time.perf_counter() - started) / CALLS)


def rows(quick: bool) -> list[Row]:
    """Every processor at two vocabularies, batches of one and eight."""
    made = []
    for name in NAMES[:2] if quick else NAMES:
        for count, vocabulary in ((2, 1000),) if quick else SIZES:
            settings = {"name": name, "rows": count, "vocabulary": vocabulary}
            sides = [Side("Tokenloom", "bench.processors:measured", {**settings, "side": "tokenloom"})]
            if name != "green-list-watermark":
                sides.append(Side("transformers", "bench.processors:measured", {**settings, "side": "transformers"}))
            made.append(Row(f"{name}, B = {count}, V = {vocabulary:,}", tuple(sides)))
    return made


TABLE = Table("processors", "Logits processors", rows, (Metric("microseconds", "a call", "µs"),))

if __name__ == "__main__":
    main(TABLE)
