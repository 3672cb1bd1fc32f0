"""Which computations a list of signal names takes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tokenloom.catalog import parts
from tokenloom.signals import (
    ATTENTION_SIGNALS,
    CHUNK_SIGNALS,
    GROUP_SIGNALS,
    SIGNAL_NAMES,
    AttentionSignal,
    ChunkSignal,
    GroupSignal,
    signal_names,
)


@dataclass(frozen=True)
class Needs:
    """The names asked for, `names`, and the registered signals among them by kind."""

    names: frozenset[str]
    chunk_signals: tuple[ChunkSignal, ...]
    group_signals: tuple[GroupSignal, ...]
    attention_signals: tuple[AttentionSignal, ...]

    @classmethod
    def parse(cls, needs: Sequence[str], *, has_values: bool) -> Self:
        """Check names against what is known.

        Raises:
            ValueError: naming the unknown signal, the known ones and the nearest.
        """
        if isinstance(needs, str):
            raise ValueError(f"needs must be a list of signal names, got the text {needs!r}; write [{needs!r}]")
        if not set(needs) <= set(SIGNAL_NAMES):
            parts()  # the methods register their signals when the catalog is loaded
        known = [*SIGNAL_NAMES, *sorted(signal_names())]
        for name in needs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown signal {name!r}; known: {', '.join(known)}{hint}")
        if not has_values and {"values", "old_values"} & set(needs):
            raise ValueError(
                "values are asked for but the model has no critic: add an empty `value_head: {}` to the model section"
            )
        names = list(dict.fromkeys(needs))
        return cls(
            frozenset(needs),
            tuple(CHUNK_SIGNALS[n] for n in names if n in CHUNK_SIGNALS),
            tuple(GROUP_SIGNALS[n] for n in names if n in GROUP_SIGNALS),
            tuple(ATTENTION_SIGNALS[n] for n in names if n in ATTENTION_SIGNALS),
        )

    @property
    def head(self) -> bool:
        """Log-probs or entropies of the policy."""
        return bool(self.names & {"logprobs", "old_logprobs", "entropies"})

    @property
    def entropies(self) -> bool:
        """Entropies of the policy."""
        return "entropies" in self.names

    @property
    def values(self) -> bool:
        """The critic's values."""
        return bool(self.names & {"values", "old_values"})

    @property
    def ref_logprobs(self) -> bool:
        """Log-probs of the reference model."""
        return "ref_logprobs" in self.names

    @property
    def ref_logits(self) -> bool:
        """The reference model's logits, for a chunk signal."""
        return any("ref_logits" in s.inputs for s in self.chunk_signals)

    @property
    def given(self) -> frozenset[str]:
        """Signals that chunk signals take as inputs."""
        return frozenset(n for s in self.chunk_signals for n in s.given)

    @property
    def reference(self) -> bool:
        """A forward through the reference model."""
        return self.ref_logprobs or self.ref_logits

    @property
    def policy(self) -> bool:
        """A forward through the policy."""
        return self.head or self.values or bool(self.chunk_signals)
