"""genlm-control's potentials as constraints: its grammars, JSON schemas and finite automata, or a user's own."""

from __future__ import annotations

import asyncio
import math
import threading
from bisect import bisect_left
from collections.abc import Collection, Sequence
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
        made = ByteVocabulary(tokenizer)
        self._pieces, self._trie = made.pieces, made.trie

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
        return piece is not None and self._viable(written, piece)

    def refused_with(self, prefix: Sequence[int], token: int) -> Tensor:
        """The ids [n] of the tokens that are refused with `token`, which is: those with the same wrong beginning."""
        piece = self._pieces[token] if token < len(self._pieces) else None
        if token in self.eos or piece is None:
            return torch.tensor([token])
        written = b"".join(self._pieces[i] or b"" for i in prefix)
        # Halving finds it, as no bytes go on from some that are not viable.
        shortest = bisect_left(range(1, len(piece)), True, key=lambda n: not self._viable(written, piece[:n])) + 1
        places = self._trie.starting_with(piece[:shortest])
        ids = self._trie.order[places.start : places.stop]
        return ids[~torch.isin(ids, torch.tensor(sorted(self.eos)))]

    def _viable(self, written: bytes, more: bytes) -> bool:
        return self._bytes_known.issuperset(more) and _score(self._potential.prefix, written + more) > -math.inf


def _score(method: Any, data: bytes) -> float:
    return float(asyncio.run_coroutine_threadsafe(method(list(data)), _event_loop()).result())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own: potentials keep state in theirs, and the caller may be inside another."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="tokenloom-potentials", daemon=True).start()
    return made
