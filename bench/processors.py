"""What a logits processor costs a token: one call on scores [B, V], ours and transformers' own of the same name.

Scores are float32, of two laws. Like a model's: a Zipf law, p ~ rank ** -1.5 with the ranks shuffled over the ids,
which has 3.2 nats and 90 % of its mass on 55 tokens (SmolLM2 135M has 3.1 nats on average over an English sentence, and
90 % on 4 to 160 tokens). Flat: random normals of deviation 3, with 6 nats and 90 % of the mass on 1,787 of 49,152
tokens, as at a high temperature; it is the hard case of rules that look for the most probable tokens. A call is the
mean of `CALLS` in a row; a forward of a small model takes some ten milliseconds beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.child import Turns
from bench.harness import Metric, Row, Side, Table, main

CALLS = 20
LAWS = {"model_like": "a call, like a model's law", "microseconds": "a call, flat law"}
SIZES = ((1, 49152), (8, 49152), (1, 151936), (8, 151936))
NAMES = ("temperature", "top-k", "top-p", "min-p", "epsilon-sampling", "eta-sampling", "locally-typical", "top-h",
         "green-list-watermark")  # fmt: skip


def ours(name: str) -> Callable[[Any, Any], Any]:
    """Tokenloom's processor."""
    from tokenloom import decode

    made: Callable[[Any, Any], Any] = decode.shaper(name)
    return made


def theirs(name: str, vocabulary: int) -> Callable[[Any, Any], Any]:
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
        "green-list-watermark": lambda: t.WatermarkLogitsProcessor(vocabulary, "cpu"),
    }
    return made[name]()  # type: ignore[no-any-return]  # transformers is untyped here


def scores_of(law: str, rows: int, vocabulary: int) -> Any:
    """Scores [rows, vocabulary], float32."""
    import torch

    g = torch.Generator().manual_seed(0)
    if law == "microseconds":
        return 3 * torch.randn(rows, vocabulary, generator=g)
    zipf = -1.5 * torch.arange(1, vocabulary + 1).log()
    return torch.stack([zipf[torch.randperm(vocabulary, generator=g)] for _ in range(rows)])


def measured(turns: Turns, *, side: str, name: str, rows: int, vocabulary: int) -> None:
    """The mean time of a call, on either law."""
    import torch

    processor = ours(name) if side == "tokenloom" else theirs(name, vocabulary)
    ids = torch.randint(vocabulary, (rows, 8), generator=torch.Generator().manual_seed(1))
    given = {law: scores_of(law, rows, vocabulary) for law in LAWS}
    for scores in given.values():
        processor(ids, scores.clone())
    for _ in turns:
        taken = {}
        for law, scores in given.items():
            copies = [scores.clone() for _ in range(CALLS)]
            started = time.perf_counter()
            for copy in copies:
                processor(ids, copy)
            taken[law] = 1e6 * (time.perf_counter() - started) / CALLS
        turns.report(**taken)


def rows(quick: bool) -> list[Row]:
    """Every processor at two vocabularies, batches of one and eight."""
    made = []
    for name in NAMES[:2] if quick else NAMES:
        for count, vocabulary in ((2, 1000),) if quick else SIZES:
            settings = {"name": name, "rows": count, "vocabulary": vocabulary}
            sides = tuple(
                Side(side, "bench.processors:measured", {**settings, "side": side.lower()})
                for side in ("Tokenloom", "transformers")
            )
            made.append(Row(f"{name}, B = {count}, V = {vocabulary:,}", sides))
    return made


METRICS = tuple(Metric(law, title, "µs") for law, title in LAWS.items())
TABLE = Table("processors", "Logits processors", rows, METRICS)

if __name__ == "__main__":
    main(TABLE)
