"""Token alignment: which tokens may come, and what is left after them."""

from __future__ import annotations

import pytest

from tokenloom.methods.decoding.token_alignment import after_token, aligned, taken_back

PIECES = [None, b"a", b"ab", b"abc", b"b", b"bc", b"c", b""]


@pytest.mark.parametrize(
    ("remaining", "kept"),
    [(b"ab", [1, 2, 3]), (b"bc", [4, 5]), (b"abcd", [1, 2, 3]), (b"z", []), (b"", list(range(8)))],
)
def test_tokens_that_write_the_rest(remaining: bytes, kept: list[int]) -> None:
    assert aligned(PIECES, remaining).nonzero().flatten().tolist() == kept


def test_what_is_left() -> None:
    assert after_token(b"abc", b"ab") == b"c"
    assert after_token(b"ab", b"abc") == b""
    assert after_token(b"ab", b"ab") == b""
    with pytest.raises(ValueError, match="does not write"):
        after_token(b"ab", b"b")


def test_taking_back() -> None:
    prompt = [0, 1, 4, 6]
    assert taken_back(prompt, PIECES) == ([0, 1, 4], b"c")
    assert taken_back(prompt, PIECES, backtrack=2) == ([0, 1], b"bc")
    assert taken_back(prompt, PIECES, backtrack=9) == ([0], b"abc"), "the start stays"
    assert taken_back([1, 4], PIECES, backtrack=9) == ([1], b"b"), "one token stays"
    assert taken_back([1, 0], PIECES) == ([1, 0], b""), "a control token has no text to write again"
    assert taken_back([1, 8], PIECES) == ([1, 8], b""), "nor has an id that the tokenizer does not know"
    assert taken_back(prompt, PIECES, backtrack=0) == (prompt, b"")
    assert prompt == [0, 1, 4, 6]
