"""Stop strings, found in the decoded text of a growing response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


class StopStrings:
    """Watches one response: `push(token)` says whether its text now contains one of `stop`.

    The text is decoded step by step from a short window of tokens, so a stop string is found at
    the token that completes it, whatever the token boundaries, and in time linear in the length.
    Special tokens count as their text. The window starts one step early because tokenizers drop or
    add a blank at the start of what they decode, and waits while a character's bytes are incomplete.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._reach = max(len(s) for s in self._stop) - 1
        self._ids: list[int] = []
        self._context = 0  # tokens of the window that are already part of the text
        self._tail = ""  # the last characters of the text: a stop string may have begun there

    def push(self, token: int) -> bool:
        """Append `token`; True when the text contains a stop string."""
        self._ids.append(token)
        known = self._decode(self._ids[: self._context])
        text = self._decode(self._ids)
        fresh = self._tail + text[len(known) :]
        if any(s in fresh for s in self._stop):
            return True
        if len(text) > len(known) and not text.endswith(_INCOMPLETE):
            self._tail = fresh[-self._reach :] if self._reach else ""
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
        return False

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
