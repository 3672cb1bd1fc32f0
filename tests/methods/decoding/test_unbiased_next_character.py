"""Branch-and-Pass: a Markov chain of characters, encoded by the longest match, gives its transitions back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.byte_level_probabilities import Cover, SortedTokens, next_byte_law
from tokenloom.methods.decoding.unbiased_next_character import branch_and_pass, next_character

STAY = {ord("A"): {ord("A"): 0.75, ord("B"): 0.25}, ord("B"): {ord("A"): 0.4, ord("B"): 0.6}}


def markov(text: bytes) -> float:
    total = 0.5 if text else 1.0
    for one, two in itertools.pairwise(text):
        total *= STAY[one][two]
    return total


def encode(text: bytes, pieces: list[bytes]) -> list[int]:
    ids: list[int] = []
    at = 0
    while at < len(text):
        token = max((p for p in pieces if text.startswith(p, at)), key=len)
        ids.append(pieces.index(token))
        at += len(token)
    return ids


class Encoded:
    """The exact law of tokens: P(v | t) from all texts of a length at which the next token is decided."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.calls = 0

    def probability(self, ids: tuple[int, ...]) -> float:
        text = b"".join(self.pieces[i] for i in ids)
        ahead = max(map(len, self.pieces))
        total = 0.0
        for rest in itertools.product(b"AB", repeat=ahead):
            whole = text + bytes(rest)
            if tuple(encode(whole, self.pieces)[: len(ids)]) == ids:
                total += markov(whole)
        return total

    def __call__(self, ids: tuple[int, ...]) -> Tensor:
        self.calls += 1
        masses = torch.tensor([self.probability((*ids, v)) for v in range(len(self.pieces))], dtype=torch.float64)
        return masses / masses.sum()


@pytest.mark.parametrize(
    "pieces", [[b"A", b"B", b"AA"], [b"A", b"B", b"AA", b"AAB"], [b"A", b"B", b"AB", b"BA", b"BAB"]]
)
def test_recovers_the_chain(pieces: list[bytes]) -> None:
    law = Encoded(pieces)
    for n in range(5):
        for text in map(bytes, itertools.product(b"AB", repeat=n)):
            assert branch_and_pass(law, pieces, text) == pytest.approx(markov(text), abs=1e-12), text
            for character in (b"A", b"B"):
                expected = markov(text + character) / markov(text)
                assert next_character(law, pieces, text, character) == pytest.approx(expected, abs=1e-12)


def test_the_worked_numbers() -> None:
    pieces = [b"A", b"B", b"AA"]
    law = Encoded(pieces)
    assert float(law(())[0]) == pytest.approx(0.125)
    assert float(law(())[2]) == pytest.approx(0.375)
    second = law((0,))
    assert float(second[0] + second[2]) == 0.0, "after the token A, another A never comes"
    assert next_character(law, pieces, b"A", b"A") == pytest.approx(0.75)
    more = [b"A", b"B", b"AA", b"AAB"]
    law = Encoded(more)
    for text, value in ((b"B", 0.5), (b"AAB", 0.09375), (b"BAAA", 0.1125), (b"AAAA", 0.2109375)):
        assert branch_and_pass(law, more, text) == pytest.approx(value, abs=1e-12)
    naive = 1.0
    ids = encode(b"BAAA", more)
    for n, token in enumerate(ids):
        naive *= float(law(tuple(ids[:n]))[token])
    assert naive == pytest.approx(0.028125, abs=1e-12)


def test_calls_do_not_exceed_the_tokens() -> None:
    pieces = [b"A", b"B", b"AA", b"AAB"]
    law = Encoded(pieces)
    branch_and_pass(law, pieces, b"BAABAAA")
    assert law.calls <= len(encode(b"BAABAAA", pieces))


def test_covers_give_the_same() -> None:
    """Greedy encodings are the canonical ones here, so the byte cover must agree."""
    pieces = [b"A", b"B", b"AA", b"AAB"]
    law = Encoded(pieces)
    for text in (b"A", b"AA", b"AAB", b"BAA"):
        cover = Cover(SortedTokens(pieces))
        cover.add((), 1.0, law(()))
        for byte in text:
            cover.advance(byte)
            for ids, mass in cover.fresh:
                cover.add(ids, mass, law(ids))
        expected = next_character(law, pieces, text, b"A")
        assert float(next_byte_law(cover.masses())[ord("A")]) == pytest.approx(expected, abs=1e-12)


def test_special_tokens_never_match_and_the_impossible_is_named() -> None:
    law = Encoded([b"A", b"B"])
    with_control = [b"A", b"B", None]
    padded = lambda ids: torch.cat((law(ids) * 0.9, torch.tensor([0.1], dtype=torch.float64)))  # noqa: E731
    assert branch_and_pass(padded, with_control, b"") == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no probability"):
        next_character(law, [b"A", b"B"], b"C", b"A")
