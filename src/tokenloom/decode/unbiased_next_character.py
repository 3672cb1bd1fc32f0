"""The law of the next character of a text under a model of tokens, free of what the last token's end suggests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.byte_level import ByteTokens, Mode, _ends, open_bytes
from tokenloom.decode.session import open_session


def next_character_law(
    model: Any, tokenizer: Any, text: str, characters: Iterable[str], *, mode: Mode = "canonical"
) -> dict[str, float]:
    """P(character | text) for each of `characters`, by the byte covers of a BPE tokenizer.

    Raises:
        ValueError: for what is not one character, or a text that the model gives no probability.
    """
    wanted = list(characters)
    if bad := [c for c in wanted if len(c) != 1]:
        raise ValueError(f"unbiased-next-character: {bad[0]!r} is not one character")
    tokens = ByteTokens(tokenizer, getattr(getattr(model, "config", None), "vocab_size", None))
    ids = list(tokenizer.encode(text))
    eos = _ends(model, tokenizer)
    law: dict[str, float] = {}
    for character in wanted:
        probability = 1.0
        data = character.encode()
        with open_bytes(model, tokens, ids, eos, mode=mode) as state:
            first = state.law()
            if all(len(c.encode()) == 1 for c in wanted):
                return {c: float(first[ord(c)]) for c in wanted}
            for n, byte in enumerate(data):
                share = float((state.law() if n else first)[byte])
                probability *= share
                if share == 0 or n == len(data) - 1:
                    break
                state.advance(byte)
        law[character] = probability
    return law


def token_law(model: Any, context: Sequence[int]) -> Callable[[tuple[int, ...]], Tensor]:
    """`law(tokens) -> [V]` after `context`, as the rules of `methods.decoding.unbiased_next_character` take it.

    For models whose tokenizer encodes by the longest match.
    """

    def law(tokens: tuple[int, ...]) -> Tensor:
        with torch.no_grad(), open_session(model, [[*context, *tokens]]) as session:
            return session.start()[0].double().cpu().softmax(-1)

    return law
