"""Rows of plain text for the terms over a corpus: the recipe's section `corpus`, and what a step draws from it.

The documents are cut into rows of at most `max_tokens` tokens, each beginning with the last token of the row before, so
that every token but a document's first is predicted once an epoch. A row is a row of `Rollouts`: its prompt is
the first token, its response the tokens behind, its mask those that enter the loss. What a step draws depends on the
seed and the step alone, so there is nothing to save.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from tokenloom.batch import Rollouts
from tokenloom.tasks import Item
from tokenloom.tasks.sources.corpus import documents, name_of
from tokenloom.train.data import derive

Span = tuple[int, int]


class CorpusConfig(BaseModel):
    """Plain text for the algorithm's terms over a corpus."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(..., description="A .txt file, a .jsonl file with a `text` on each line, or a shipped text.")
    rows_per_step: int = Field(4, ge=1, description="Rows of text in every update of a step.")
    max_tokens: int = Field(128, ge=2, description="Longest row, its first token included, which is only context.")


def check_corpus(config: CorpusConfig) -> None:
    """Raises ValueError for a text that is missing, malformed or empty."""
    documents(config.path)


class CorpusStream:
    """Draws rows without replacement, each epoch in a new order decided by (seed, epoch).

    Raises:
        ValueError: for a text as in `check_corpus`, one of a single token, or a tokenizer that cannot say where
            its tokens stand.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Any, seed: int) -> None:
        self.config, self.seed = config, seed
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("corpus: needs a fast tokenizer, which says where in the text its tokens stand")
        self.rows: list[tuple[str, list[int], list[Span]]] = []
        for text in documents(config.path):
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, spans = list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]
            for start in range(0, len(ids) - 1, config.max_tokens - 1):
                cut = slice(start, start + config.max_tokens)
                self.rows.append((name_of(text), ids[cut], spans[cut]))
        if not self.rows:
            raise ValueError(f"corpus: {config.path} has no two tokens in a row: there is nothing to predict")

    def draw(self, step: int, items: Iterable[Item] = ()) -> Rollouts:
        """The rows of a step; tokens that hold an answer of `items` are masked, which learn them otherwise."""
        count = len(self.rows)
        first = step * self.config.rows_per_step
        chosen = [self._at(n // count, n % count) for n in range(first, first + self.config.rows_per_step)]
        used: dict[str, list[Span]] = {}
        for item in items:
            if "document" in item.metadata and "span" in item.metadata:
                begin, end = item.metadata["span"]
                used.setdefault(item.metadata["document"], []).append((begin, end))
        rows = [self.rows[i] for i in chosen]
        masks = [[not _overlaps(span, used.get(name, [])) for span in spans[1:]] for name, _, spans in rows]
        return Rollouts.build(
            [ids[:1] for _, ids, _ in rows],
            [ids[1:] for _, ids, _ in rows],
            torch.tensor(chosen),
            response_masks=masks,
        )

    def _at(self, epoch: int, place: int) -> int:
        generator = torch.Generator().manual_seed(derive(self.seed, "corpus", epoch))
        return int(torch.randperm(len(self.rows), generator=generator)[place])


def _overlaps(span: Span, others: list[Span]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in others)
