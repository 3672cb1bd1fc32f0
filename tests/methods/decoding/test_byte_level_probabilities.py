"""Byte laws from covers: equal to brute force over token sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.byte_level_probabilities import (
    END,
    Cover,
    SortedTokens,
    mean_law,
    next_byte_law,
)

PIECES = [b"a", b"b", b"ab", b"ba", b"aab", None, b"a", None]
EOS, CONTROL = 5, 7


def token_law(prefix: Sequence[int]) -> Tensor:
    """A law for every prefix; the end has some mass, another control token none."""
    generator = torch.Generator().manual_seed(hash(tuple(prefix)) & 0xFFFFFF)
    masses = torch.rand(len(PIECES), generator=generator, dtype=torch.float64) + 0.1
    masses[CONTROL] = 0.0
    return masses / masses.sum()


def probability(ids: Sequence[int]) -> float:
    total = 1.0
    for n, token in enumerate(ids):
        total *= float(token_law(ids[:n])[token])
    return total


def brute(text: bytes) -> float:
    """P(text starts with `text`), by walking all sequences that reach its end."""
    total, pending = 0.0, [((), b"")]
    while pending:
        ids, written = pending.pop()
        if len(written) >= len(text):
            total += probability(ids)
            continue
        for token, piece in enumerate(PIECES):
            if piece and (written + piece)[: len(text)] == text[: len(written + piece)]:
                pending.append(((*ids, token), written + piece))
    return total


def cover_of(text: bytes, prune: float = 0.0) -> Cover:
    cover = Cover(SortedTokens(PIECES))
    cover.add((), 1.0, token_law(()), [EOS])
    for byte in text:
        cover.advance(byte, prune=prune)
        for ids, mass in cover.fresh:
            assert mass == pytest.approx(probability(ids), abs=1e-12)
            cover.add(ids, mass, token_law(ids), [EOS])
    return cover


@pytest.mark.parametrize("text", [bytes(t) for n in range(5) for t in itertools.product(b"ab", repeat=n)])
def test_masses_equal_brute_force_and_sum_up(text: bytes) -> None:
    masses = cover_of(text).masses()
    for byte in b"ab":
        assert float(masses[byte]) == pytest.approx(brute(text + bytes([byte])), abs=1e-12)
    assert float(masses.sum()) == pytest.approx(brute(text) if text else 1.0, abs=1e-12)
    assert set(masses.nonzero()[:, 0].tolist()) <= {ord("a"), ord("b"), END}
    assert cover_of(text).mass == pytest.approx(float(masses.sum()), abs=1e-12)


def test_chain_rule() -> None:
    text = b"abaab"
    product = 1.0
    for n in range(len(text)):
        product *= float(next_byte_law(cover_of(text[:n]).masses())[text[n]])
    assert product == pytest.approx(brute(text), abs=1e-12)


def test_a_vocabulary_of_bytes_gives_the_models_own_law() -> None:
    tokens = SortedTokens([bytes([b]) for b in range(256)] + [None])
    law = torch.rand(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law /= law.sum()
    cover = Cover(tokens)
    cover.add((), 1.0, law, [256])
    torch.testing.assert_close(next_byte_law(cover.masses()), law, rtol=0, atol=1e-14)


def test_invalid_and_pruned_sequences_do_not_count() -> None:
    cover = Cover(SortedTokens(PIECES))
    cover.add((), 1.0, token_law(()), [EOS])
    cover.advance(ord("a"), valid=lambda ids: ids != (6,))
    assert [ids for ids, _ in cover.fresh] == [(0,)]
    full, pruned = cover_of(b"abab"), cover_of(b"abab", prune=0.2)
    assert 0 < len(pruned.branches) < len(full.branches)
    cover.advance(ord("z"))
    assert not cover.branches
    assert not cover.fresh
    with pytest.raises(ValueError, match="no probability"):
        next_byte_law(cover.masses())
    with pytest.raises(ValueError, match="no token has bytes"):
        SortedTokens([None, b""])


def test_temperature_and_top_p() -> None:
    masses = torch.zeros(257, dtype=torch.float64)
    masses[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1]) / 50
    law = next_byte_law(masses, temperature=0.5)
    expected = torch.tensor([0.16, 0.09, 0.04, 0.01], dtype=torch.float64) / 0.3
    torch.testing.assert_close(law[:4], expected, rtol=0, atol=1e-7)
    assert next_byte_law(masses, temperature=0.0).nonzero().tolist() == [[0]]
    assert next_byte_law(masses, top_p=0.65).nonzero().flatten().tolist() == [0, 1]
    assert next_byte_law(masses, top_p=0.75).nonzero().flatten().tolist() == [0, 1, 2], (
        "kept while the mass before is <= p"
    )


def test_the_mean_of_models() -> None:
    one, two = torch.zeros(257), torch.zeros(257)
    one[3], two[4] = 1.0, 1.0
    mean = mean_law(torch.stack([one, two]))
    assert mean[[3, 4]].tolist() == [0.5, 0.5]
