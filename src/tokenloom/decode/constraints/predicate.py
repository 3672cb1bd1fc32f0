"""Any Python function on text as a constraint."""

from __future__ import annotations

import codecs
import unicodedata
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.token_bytes import ByteVocabulary

_KEPT = 4096


class PredicateConstraint:
    """Text for which `complete(text)` holds, built up from prefixes for which `viable(text)` holds.

    `viable` must hold for every beginning of a complete text; without it every prefix counts as viable, and the
    constraint is checked at the end alone. Both see the text generated so far. The first bytes of a character are
    viable where any assigned character that they begin would be. Control tokens other than the end are never allowed.
    """

    def __init__(
        self,
        tokenizer: Any,
        complete: Callable[[str], bool],
        viable: Callable[[str], bool] | None = None,
        name: str | None = None,
    ) -> None:
        """Read the tokenizer's bytes.

        Raises:
            ValueError: for what is no function, a tokenizer whose tokens have no bytes of their own, or one without an
                end token.
        """
        if not callable(complete) or not (viable is None or callable(viable)):
            wrong = viable if callable(complete) else complete
            raise ValueError(f"a predicate is a function of the text so far that gives true or false, got {wrong!r}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.name = name or f"the predicate {getattr(complete, '__name__', type(complete).__name__)}"
        self.eos: frozenset[int] = frozenset([tokenizer.eos_token_id])
        vocabulary = ByteVocabulary(tokenizer)
        self._pieces, self._trie = vocabulary.pieces, vocabulary.trie
        self._complete, self._viable = complete, viable
        self._texts: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
        self._begun: OrderedDict[tuple[str, bytes], bool] = OrderedDict()

    def with_eos(self, eos: Collection[int]) -> PredicateConstraint:
        """The same for other end tokens."""
        other = copy(self)
        other.eos = frozenset(eos)
        return other

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """Whether `token` keeps the text viable, or ends a complete one."""
        written = self._bytes(tuple(prefix))
        if token in self.eos:
            text, rest = _decoded(written)
            return not rest and text is not None and bool(self._complete(text))
        piece = self._pieces[token] if token < len(self._pieces) else None
        if piece is None:
            return False
        text, rest = _decoded(written + piece)
        if text is None or self._viable is None:
            return text is not None
        return self._may_begin(self._viable, text, rest) if rest else bool(self._viable(text))

    def refused_with(self, prefix: Sequence[int], token: int) -> Tensor:
        """The ids [n] of the tokens that are refused with `token`, which is: those with the same wrong beginning.

        Found by halving, as no text goes on from one that is not viable.
        """
        piece = self._pieces[token] if token < len(self._pieces) else None
        if token in self.eos or piece is None:
            return torch.tensor([token])
        written = self._bytes(tuple(prefix))
        shortest = bisect_left(range(1, len(piece)), True, key=lambda n: self._wrong(written, piece[:n])) + 1
        places = self._trie.starting_with(piece[:shortest])
        ids = self._trie.order[places.start : places.stop]
        if shortest == len(piece) and _decoded(written + piece)[1]:
            # Half a character was judged by the assigned ones; a token that completes it may hold another.
            longer = self._trie.sorted_pieces[places.start : places.stop]
            text = _decoded(written + piece)[0]
            halves = [_decoded(written + p) for p in longer]
            ids = ids[torch.tensor([t == text and rest != b"" for t, rest in halves])]
        return ids[~torch.isin(ids, torch.tensor(sorted(self.eos)))]

    def _wrong(self, written: bytes, more: bytes) -> bool:
        """Whether nothing that goes on with `more` is viable, as far as its whole characters tell."""
        text, _ = _decoded(written + more)
        if text is None or self._viable is None:
            return text is None
        # The text so far is not in question; many a function on text does not hold for the empty one.
        return text != _decoded(written)[0] and not self._viable(text)

    def _may_begin(self, viable: Callable[[str], bool], text: str, rest: bytes) -> bool:
        """Whether `text` may go on with a character whose first bytes are `rest`."""
        key = text, rest
        if key not in self._begun:
            self._begun[key] = any(viable(text + character) for character in _beginning_with(rest))
            if len(self._begun) > _KEPT:
                self._begun.popitem(last=False)
        return self._begun[key]

    def _bytes(self, prefix: tuple[int, ...]) -> bytes:
        found = self._texts.get(prefix)
        if found is None:
            shorter = self._texts.get(prefix[:-1])
            if prefix and shorter is not None:
                found = shorter + (self._pieces[prefix[-1]] or b"")
            else:
                found = b"".join(self._pieces[i] or b"" for i in prefix)
            self._texts[prefix] = found
            if len(self._texts) > _KEPT:
                self._texts.popitem(last=False)
        return found


def _decoded(data: bytes) -> tuple[str | None, bytes]:
    """The text of `data` and the first bytes of its last character where that is incomplete; None for no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None, b""
    return text, decoder.getstate()[0]


@cache
def _beginning_with(rest: bytes) -> tuple[str, ...]:
    """All assigned characters, private ones left out, whose UTF-8 begins with `rest`."""
    table = _characters()
    # UTF-8 sorts as the characters do.
    begin, end = bisect_left(table, rest), bisect_left(table, rest + b"\xff")
    return tuple(encoded.decode() for encoded in table[begin:end])


@cache
def _characters() -> list[bytes]:
    # Planes 4 to 13 have no characters yet, 15 and 16 private ones only.
    wide = (chr(i) for plane in (range(0x80, 0x40000), range(0xE0000, 0xF0000)) for i in plane)
    return [c.encode() for c in wide if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
