"""Text of prompts and of untrusted model output, made short and safe to print."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

MAX_TEXT = 8_000


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """`text` cut to `limit` characters, followed by how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]}… [+{len(text) - limit:,} characters]"


def prompt_text(prompt: Any) -> str:
    """A prompt as text: chat messages become one `role: content` block each."""
    if isinstance(prompt, list) and all(isinstance(m, dict) and "content" in m for m in prompt):
        return shorten("\n\n".join(f"{m.get('role', 'user')}: {m['content']}" for m in prompt))
    if isinstance(prompt, str):
        return shorten(prompt)
    return "" if prompt is None else shorten(json.dumps(prompt, ensure_ascii=False))


def printable(text: str, limit: int = 200) -> str:
    """One line that is safe on a terminal: controls, bidi marks and lone surrogates become `\\uXXXX`."""
    return "".join(_visible(c) for c in shorten(text, limit))


def visible(text: str) -> str:
    """Text of several lines, of which every other control character becomes `\\uXXXX`."""
    return "\n".join(printable(line, len(line)) for line in text.expandtabs(4).split("\n"))


def _visible(char: str) -> str:
    if char == "\n":
        return "\\n"
    if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"\\u{ord(char):04x}"
    return char
