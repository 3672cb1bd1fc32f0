"""The bytes behind the tokens of a tokenizer, and a trie over them.

A tokenizer's own text of a token is not what the token adds to a text: byte-level BPE writes bytes as printable
characters, SentencePiece writes blanks as "▁", unknown bytes as "<0xE2>", and drops the blank that it put before the
first word. `ByteVocabulary` undoes all that, so that the bytes of a sequence are the bytes of its tokens joined.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_BLANK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteVocabulary:
    """`pieces[id]` is what a token adds to the text, or None for control tokens and ids that no token has.

    `leading_blank`: the tokenizer writes a blank before the first word, which its own decoding drops again;
    here it stays part of the bytes.
    """

    def __init__(self, tokenizer: Any, size: int | None = None) -> None:
        """`size`: the model's vocabulary, where it is larger than the tokenizer's.

        Raises:
            ValueError: for a tokenizer whose tokens have no bytes of their own, such as WordPiece.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast backend, which knows the bytes of its tokens; "
                "load the fast tokenizer of the model"
            )
        layout = json.loads(backend.to_str())
        self.tokenizer = tokenizer
        self._reads = _reader(layout.get("decoder"), type(tokenizer).__name__)
        added = {t["id"]: t for t in layout.get("added_tokens", [])}
        # A control token may be declared by the tokenizer's attributes alone.
        special = {i for i, t in added.items() if t["special"]} | set(tokenizer.all_special_ids)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        count = max(size or 0, max(vocabulary.values()) + 1)
        self.pieces: list[bytes | None] = [None] * count
        for text, i in vocabulary.items():
            if i not in special:
                # Byte-level tokens added later are written as they are.
                plain = i in added and self._reads is _read_byte_level
                self.pieces[i] = (text.encode() if plain else self._reads(text)) or None
        self.leading_blank = self.decode(self.encode("a")).startswith(b" ")

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, control tokens and ids that no token has left out."""
        return b"".join(self.pieces[i] or b"" for i in ids if i < len(self.pieces))

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own ids of a whole text, without control tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids whose bytes are `data`: the tokenizer's own where it writes exactly these, else the longest tokens.

        Raises:
            ValueError: when no token has the next byte.
        """
        if not data:
            return []
        text = _text(data)
        if text is not None:
            for candidate in (text[1:], text) if self.leading_blank and text.startswith(" ") else (text,):
                ids = self.encode(candidate)
                if self.decode(ids) == data and not any(self.pieces[i] is None for i in ids):
                    return ids
        return self.trie.longest(data)

    @cached_property
    def trie(self) -> TokenTrie:
        """The trie of all pieces, built at first use."""
        return TokenTrie(self.pieces)


class TokenTrie:
    """Tokens by their bytes: in byte order, the tokens that start with given bytes stand side by side.

    `order` [n] holds the ids in that order, `sorted_pieces` their bytes.
    """

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        """`pieces[id]`: the bytes of each token, None (or empty) for those without."""
        ranked = sorted((piece, i) for i, piece in enumerate(pieces) if piece)
        self.size = len(pieces)
        self.sorted_pieces = [piece for piece, _ in ranked]
        self.order = torch.tensor([i for _, i in ranked], dtype=torch.int64)
        self._first: dict[bytes, int] = {}
        for place, piece in enumerate(self.sorted_pieces):
            self._first.setdefault(piece, place)

    def starting_with(self, prefix: bytes) -> range:
        """Places in `order` of the tokens that start with `prefix`."""
        after = _after(prefix)
        end = len(self.sorted_pieces) if after is None else bisect_left(self.sorted_pieces, after)
        return range(bisect_left(self.sorted_pieces, prefix), end)

    def exactly(self, piece: bytes) -> list[int]:
        """Ids of the tokens with just these bytes."""
        place = self._first.get(piece)
        found = []
        while place is not None and place < len(self.sorted_pieces) and self.sorted_pieces[place] == piece:
            found.append(int(self.order[place]))
            place += 1
        return found

    def prefixes_of(self, data: bytes) -> list[int]:
        """Ids of the tokens that `data` starts with, shortest first."""
        return [i for n in range(1, len(data) + 1) for i in self.exactly(data[:n])]

    def compatible(self, remaining: bytes) -> Tensor:
        """[V] bool: tokens that start with `remaining` or that `remaining` starts with (all but control tokens if it
        is empty)."""
        keep = torch.zeros(self.size, dtype=torch.bool)
        places = self.starting_with(remaining)
        keep[self.order[places.start : places.stop]] = True
        keep[torch.tensor(self.prefixes_of(remaining), dtype=torch.int64)] = True
        return keep

    def longest(self, data: bytes) -> list[int]:
        """`data` as ids, at each place the longest token.

        Raises:
            ValueError: when no token has the next byte.
        """
        ids: list[int] = []
        at = 0
        longest = max(map(len, self.sorted_pieces), default=0)
        while at < len(data):
            for n in range(min(longest, len(data) - at), 0, -1):
                if found := self.exactly(data[at : at + n]):
                    ids.append(found[0])
                    at += n
                    break
            else:
                raise ValueError(f"no token writes the byte {data[at : at + 1]!r}; the text cannot be written")
        return ids


def token_bytes(tokenizer: Any, size: int | None = None) -> list[bytes | None]:
    """The bytes that each token adds to a text; None for control tokens. See `ByteVocabulary`."""
    return ByteVocabulary(tokenizer, size).pieces


def _reader(decoder: Any, name: str) -> Callable[[str], bytes]:
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _read_byte_level
    replaced = [s["content"] for s in steps if s["type"] == "Replace" and s["pattern"].get("String") == _BLANK]
    blanks = [" "] if "Metaspace" in kinds else replaced
    if blanks or (kinds and set(kinds) <= {"Fuse", "ByteFallback"}):
        fallback = "ByteFallback" in kinds
        return lambda text: _read_plain(text, blanks, fallback)
    raise ValueError(
        f"{name} joins its tokens by rules ({' + '.join(kinds) or 'with blanks'}) that give a token no bytes of its "
        "own; methods over bytes take byte-level BPE and SentencePiece tokenizers"
    )


def _read_plain(text: str, blanks: list[str], fallback: bool) -> bytes:
    if fallback and (found := _BYTE_TOKEN.fullmatch(text)):
        return bytes([int(found[1], 16)])
    return (text.replace(_BLANK, blanks[0]) if blanks else text).encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's writing of bytes: printable ones as themselves, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_TABLE = _byte_level_table()


def _read_byte_level(text: str) -> bytes:
    # A token with other characters was added later, and stands for itself.
    return bytes(_TABLE[c] for c in text) if all(c in _TABLE for c in text) else text.encode()


def _after(prefix: bytes) -> bytes | None:
    """The least byte string that is greater than all that start with `prefix`; None when there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
