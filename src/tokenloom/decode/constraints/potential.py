"""genlm-control's potentials as constraints: its grammars, JSON schemas and finite automata, or a user's own."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Collection, Sequence
from copy import copy
from functools import cache
from typing import Any

from tokenloom.decode.token_bytes import ByteVocabulary


class PotentialConstraint:
    """A Boolean potential over bytes: a prefix is viable where `prefix` is above -inf, complete where `complete` is.

    The potential's vocabulary must be bytes as integers, as that of genlm-control's `BoolFSA`, `BoolCFG` and
    `JsonSchema` is. Weights other than 0 and -inf count as allowed.
    """

    def __init__(self, tokenizer: Any, potential: Any) -> None:
        """Take the potential before it is coerced to a model.

        Raises:
            ValueError: for a potential over anything but bytes, or a tokenizer without an end token.
        """
        vocabulary = getattr(potential, "vocab", None)
        if vocabulary is None or not all(isinstance(token, int) for token in vocabulary):
            raise ValueError(
                f"{type(potential).__name__} is not a potential over bytes; give it before coercing it to a model"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.name = f"the potential {type(potential).__name__}"
        self.eos: frozenset[int] = frozenset([tokenizer.eos_token_id])
        self._potential = potential
        self._bytes_known = frozenset(vocabulary)
        self._pieces = ByteVocabulary(tokenizer).pieces

    def with_eos(self, eos: Collection[int]) -> PotentialConstraint:
        """The same for other end tokens."""
        other = copy(self)
        other.eos = frozenset(eos)
        return other

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """Whether `token` keeps the bytes viable, or ends complete ones."""
        written = b"".join(self._pieces[i] or b"" for i in prefix)
        if token in self.eos:
            return _score(self._potential.complete, written) > -math.inf
        piece = self._pieces[token] if token < len(self._pieces) else None
        if piece is None or not self._bytes_known.issuperset(piece):
            return False
        return _score(self._potential.prefix, written + piece) > -math.inf


def _score(method: Any, data: bytes) -> float:
    return float(asyncio.run_coroutine_threadsafe(method(list(data)), _event_loop()).result())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own: potentials keep state in theirs, and the caller may be inside another."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="tokenloom-potentials", daemon=True).start()
    return made
