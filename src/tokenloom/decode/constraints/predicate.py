"""Any Python function on text as a constraint."""

from __future__ import annotations

import codecs
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any

from tokenloom.decode.token_bytes import ByteVocabulary

_KEPT = 4096
_NEVER = "\ufffd"


class PredicateConstraint:
    """Text for which `complete(text)` holds, built up from prefixes for which `viable(text)` holds.

    `viable` must hold for every beginning of a complete text; without it every prefix counts as viable, and the
    constraint is checked at the end alone. Both see the text generated so far, without the beginnings of characters
    whose bytes are still incomplete. Control tokens other than the end are never allowed.
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
            ValueError: for a tokenizer whose tokens have no bytes of their own, or without an end token.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.name = name or f"the predicate {getattr(complete, '__name__', type(complete).__name__)}"
        self.eos: frozenset[int] = frozenset([tokenizer.eos_token_id])
        self._pieces = ByteVocabulary(tokenizer).pieces
        self._complete, self._viable = complete, viable
        self._texts: OrderedDict[tuple[int, ...], bytes] = OrderedDict()

    def with_eos(self, eos: Collection[int]) -> PredicateConstraint:
        """The same for other end tokens."""
        other = copy(self)
        other.eos = frozenset(eos)
        return other

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """Whether `token` keeps the text viable, or ends a complete one."""
        written = self._bytes(tuple(prefix))
        if token in self.eos:
            text = _decoded(written, final=True)
            return text != _NEVER and bool(self._complete(text))
        piece = self._pieces[token] if token < len(self._pieces) else None
        if piece is None:
            return False
        text = _decoded(written + piece, final=False)
        return text != _NEVER and (self._viable is None or bool(self._viable(text)))

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


def _decoded(data: bytes, *, final: bool) -> str:
    """The text of `data`, an incomplete last character left out unless `final`; `_NEVER` when it is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return decoder.decode(data, final=final)
    except UnicodeDecodeError:
        return _NEVER
