"""Constraints: `accept` and `mask` agree, with each other and with what the text says."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import sys
import unicodedata
from typing import Any

import pytest
import torch

from decode.tokenizers_at_hand import byte_level, real, sentencepiece
from tokenloom import decode
from tokenloom.decode.constraints import (
    GrammarConstraint,
    JsonSchemaConstraint,
    PotentialConstraint,
    PredicateConstraint,
    RegexConstraint,
    allowed,
    ending_with,
)
from tokenloom.decode.token_bytes import token_bytes

pytest.importorskip("llguidance", reason="python -m pip install 'tokenloom[constraints]'")
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
TOKENIZERS = [byte_level, sentencepiece]


def _agree(constraint: Any, prefix: list[int], size: int) -> list[int]:
    by_one = [t for t in range(size) if constraint.accept(prefix, t)]
    by_mask = constraint.mask(prefix).nonzero()[:, 0].tolist()
    assert by_one == by_mask, prefix
    return by_one


@pytest.mark.parametrize("made", TOKENIZERS)
def test_a_pattern_allows_what_it_matches(made: Any) -> None:
    tokenizer = made()
    pieces = token_bytes(tokenizer)
    constraint = RegexConstraint(tokenizer, pattern="a(ba)*|ST\u20ac")
    seen = {()}
    frontier: list[tuple[int, ...]] = [()]
    for prefix in frontier:
        text = b"".join(pieces[t] or b"" for t in prefix)
        possible = _agree(constraint, list(prefix), len(pieces))
        for token in range(len(pieces)):
            if token == tokenizer.eos_token_id:
                expected = re.fullmatch("a(ba)*|ST\u20ac", text.decode(errors="replace")) is not None
            else:
                after = text + (pieces[token] or b"\0")
                expected = any(w.startswith(after) for w in [("a" + "ba" * 20).encode(), "ST\u20ac".encode()])
            assert (token in possible) == expected, (text, pieces[token])
        for token in possible:
            longer = (*prefix, token)
            if token != tokenizer.eos_token_id and len(longer) <= 3 and longer not in seen:
                seen.add(longer)
                frontier.append(longer)
    assert len(seen) > 5


@pytest.mark.parametrize("made", TOKENIZERS)
def test_walks_through_a_schema_give_valid_json(made: Any) -> None:
    tokenizer = made()
    pieces = token_bytes(tokenizer)
    constraint = JsonSchemaConstraint(tokenizer, schema=json.dumps(SCHEMA))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        prefix: list[int] = []
        while tokenizer.eos_token_id not in prefix:
            possible = _agree(constraint, prefix, len(pieces))
            wanted = (
                possible
                if len(prefix) < 12
                else [t for t in possible if (pieces[t] or b"").strip()[:1] not in b"0123456789 "]
            )
            ends = [t for t in possible if t == tokenizer.eos_token_id]
            choices = ends or wanted or possible
            prefix.append(choices[int(torch.randint(len(choices), (), generator=generator))])
        written = json.loads(b"".join(pieces[t] or b"" for t in prefix))
        assert list(written) == ["age"]
        assert isinstance(written["age"], int)


def test_a_grammar_counts_brackets() -> None:
    tokenizer = byte_level()
    constraint = GrammarConstraint(tokenizer, lark='start: "(" start? ")"')
    ids = tokenizer.encode("((", add_special_tokens=False)
    assert not constraint.accept(ids, tokenizer.eos_token_id)
    ids = tokenizer.encode("(())", add_special_tokens=False)
    assert constraint.accept(ids, tokenizer.eos_token_id)
    assert not constraint.accept(ids, tokenizer.encode(")")[0])
    garbage = tokenizer.encode(")x", add_special_tokens=False)
    assert not constraint.mask(garbage).any()
    assert not constraint.accept(garbage, tokenizer.eos_token_id)


def test_a_predicate_sees_text() -> None:
    tokenizer = byte_level()
    seen: list[str] = []

    def even(text: str) -> bool:
        seen.append(text)
        return len(text) % 2 == 0

    constraint = PredicateConstraint(tokenizer, even, lambda text: "x" not in text)
    euro = tokenizer.encode("\u20ac", add_special_tokens=False)
    x = tokenizer.encode("x", add_special_tokens=False)[0]
    assert len(euro) >= 1
    assert not constraint.accept(euro, tokenizer.eos_token_id)
    assert seen[-1] == "\u20ac"
    assert constraint.accept(euro + euro, tokenizer.eos_token_id)
    assert not constraint.accept([], x)
    assert constraint.accept([], euro[0])
    assert not constraint.accept([], tokenizer.bos_token_id)
    pieces = token_bytes(tokenizer)
    first_byte = pieces.index(b"\xe2")
    assert constraint.accept([], first_byte)
    assert not constraint.accept([first_byte], tokenizer.eos_token_id), "half a character is no text"
    assert not constraint.accept([first_byte], pieces.index(b"\xe2")), "and this never becomes one"
    assert constraint.with_eos([0]).accept([], 0)


def test_helpers_and_errors() -> None:
    tokenizer = byte_level()
    size = len(token_bytes(tokenizer))
    constraint = RegexConstraint(tokenizer, pattern="ab?")
    probs = torch.full((size + 20,), 0.1)
    probs[token_bytes(tokenizer).index(b"a")] = 0.0
    assert not allowed(constraint, [], probs).any() or token_bytes(tokenizer).count(b"ab")
    padded = constraint.with_eos([size + 5])
    prefix = [token_bytes(tokenizer).index(b"a")]
    assert padded.mask(prefix)[size + 5]
    assert allowed(padded, prefix, probs).sum() == 2
    plain = PredicateConstraint(tokenizer, lambda text: text == "a", lambda text: "a".startswith(text))
    probs[128:] = 0.0  # no beginnings of longer characters, which stay viable
    assert allowed(plain, prefix, probs[:128]).nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="PredicateConstraint"):
        ending_with(print, [1])
    with pytest.raises(ValueError, match="the pattern ab"):
        ending_with(constraint, [])
    with pytest.raises(ValueError, match="cannot be read"):
        RegexConstraint(tokenizer, pattern="(")
    with pytest.raises(ValueError, match="JSON schema"):
        JsonSchemaConstraint(tokenizer, schema="{")
    with pytest.raises(ValueError, match="cannot be read"):
        GrammarConstraint(tokenizer, lark="start: missing_rule")
    with pytest.raises(ValueError, match=r'Unimplemented keys: \["not"\].*leave these out'):
        JsonSchemaConstraint(tokenizer, schema={"not": {"type": "string"}})
    with pytest.raises(ValueError, match=r"not JSON .*model_json_schema"):
        JsonSchemaConstraint(tokenizer, schema={"enum": {1, 2}})
    for functions in (("yes",), (bool, "yes")):
        with pytest.raises(ValueError, match=r"function of the text so far.*'yes'"):
            PredicateConstraint(tokenizer, *functions)  # type: ignore[arg-type]
    made = decode.build("constraint", "regex", {"tokenizer": tokenizer}, pattern="b")
    assert made.accept([], token_bytes(tokenizer).index(b"b"))


def test_the_planes_left_out_have_no_characters() -> None:
    left_out = itertools.chain(range(0x40000, 0xE0000), range(0xF0000, sys.maxunicode + 1))
    assert {unicodedata.category(chr(i)) for i in left_out} <= {"Cn", "Co"}


def test_half_a_character_goes_where_a_whole_one_may() -> None:
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer)
    probed: list[str] = []

    def viable(text: str) -> bool:
        probed.append(text)
        return text in ("1", "1\u20ac", "1\u20ac\U0001f600")

    constraint = PredicateConstraint(tokenizer, lambda text: True, viable)
    e2, b82, ac, c3, f0 = (pieces.index(bytes([b])) for b in (0xE2, 0x82, 0xAC, 0xC3, 0xF0))
    one = pieces.index(b"1")
    allowed_after = {
        (): {one},
        (one,): {e2, *([pieces.index(b"\xe2\x82")] if b"\xe2\x82" in pieces else [])},
        (one, e2): {b82, *([pieces.index(b"\x82\xac")] if b"\x82\xac" in pieces else [])},
        (one, e2, b82): {ac},
        (one, e2, b82, ac): {f0},
    }
    euro = pieces.index("\u20ac".encode()) if "\u20ac".encode() in pieces else None
    for prefix, expected in allowed_after.items():
        found = {t for t in range(len(pieces)) if t not in constraint.eos and constraint.accept(prefix, t)}
        assert found - {euro} == expected, prefix
    assert c3 not in allowed_after[(one,)]
    # What was found out once is not asked again.
    count = len(probed)
    assert not constraint.accept([one], f0)
    assert not constraint.accept([one], c3)
    assert len(probed) == count


def _refused(constraint: Any, prefix: list[int], size: int) -> None:
    """Whatever is refused with a token would be refused alone; most are refused with others."""
    largest = 0
    for token in range(size):
        if not constraint.accept(prefix, token):
            ids = constraint.refused_with(prefix, token).tolist()
            assert token in ids
            assert not any(constraint.accept(prefix, i) for i in ids), (prefix, token, ids)
            largest = max(largest, len(ids))
    assert largest > 2


@pytest.mark.parametrize("made", TOKENIZERS)
def test_a_refused_text_takes_those_that_begin_like_it_along(made: Any) -> None:
    tokenizer = made()
    pieces = token_bytes(tokenizer)
    wanted = ["a\u20acb", "ab", "a S"]

    def viable(text: str) -> bool:
        return any(w.startswith(text) for w in wanted)

    constraint = PredicateConstraint(tokenizer, lambda text: text in wanted, viable)
    a, first = pieces.index(b"a"), pieces.index(b"\xe2")
    for prefix in ([], [a], [a, first], [a, pieces.index(b"b")]):
        _refused(constraint, prefix, len(pieces))
    # A token with bytes that is an end is judged as an end, whatever begins like it.
    ending = constraint.with_eos([a])
    blank = next(i for i, piece in enumerate(pieces) if piece == b" ")
    assert ending.accept([a, pieces.index(b"b")], a)
    assert a not in ending.refused_with([a, pieces.index(b"b")], blank).tolist()
    assert ending.refused_with([], a).tolist() == [a]


def test_a_function_that_does_not_hold_for_the_empty_text_refuses_no_first_half() -> None:
    tokenizer = real("smollm2")
    pieces = token_bytes(tokenizer)
    first, whole = pieces.index(b"\xc3"), pieces.index("\u00e9".encode())
    constraint = PredicateConstraint(tokenizer, "\u00ef".__eq__, "\u00ef".__eq__)
    assert constraint.accept([], first)
    assert not constraint.accept([], whole)
    assert first not in constraint.refused_with([], whole).tolist()


def test_all_answers_of_a_predicate_take_few_calls() -> None:
    tokenizer = byte_level()
    size = len(token_bytes(tokenizer))
    calls = 0

    def viable(text: str) -> bool:
        nonlocal calls
        calls += all(ord(c) < 128 for c in text)
        return "the answer".startswith(text)

    constraint = PredicateConstraint(tokenizer, lambda text: False, viable)
    one_by_one = torch.tensor([constraint.accept([], t) for t in range(size)])
    asked, calls = calls, 0
    assert torch.equal(allowed(constraint, [], torch.ones(size)), one_by_one)
    assert one_by_one.sum() >= 2
    assert calls < asked, "some tokens begin like others"


def test_a_replacement_character_is_text() -> None:
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer)
    constraint = PredicateConstraint(tokenizer, lambda text: text == "\ufffd", lambda text: "\ufffd".startswith(text))
    written = [pieces.index(bytes([b])) for b in "\ufffd".encode()]
    for n, token in enumerate(written):
        assert constraint.accept(written[:n], token)
    assert constraint.accept(written, tokenizer.eos_token_id)


def test_ends_told_to_one_copy_are_not_those_of_another() -> None:
    tokenizer = byte_level()
    a, b = (token_bytes(tokenizer).index(x) for x in (b"a", b"b"))
    constraint = RegexConstraint(tokenizer, pattern="a+b")
    assert not constraint.with_eos([a]).mask([a]).any(), "nothing follows an end"
    assert constraint.accept([a], b)


def test_a_long_text_is_judged_as_a_whole() -> None:
    tokenizer = byte_level()
    a, b = (token_bytes(tokenizer).index(x) for x in (b"a", b"b"))
    constraint = RegexConstraint(tokenizer, pattern="a*b")
    assert constraint.accept([a] * 3000, b)
    assert not constraint.accept([*([a] * 2000), b, *([a] * 500)], a)


class Digits:
    """A potential over bytes: at most two digits, of which the first is not 0."""

    vocab = range(128)

    async def prefix(self, context: list[int]) -> float:
        text = bytes(context)
        return 0.0 if not text or (text.isdigit() and len(text) <= 2 and text[:1] != b"0") else -math.inf

    async def complete(self, context: list[int]) -> float:
        return await self.prefix(context) if context else -math.inf


def test_a_potential_over_bytes() -> None:
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer)
    constraint = PotentialConstraint(tokenizer, Digits())
    for prefix in ([], [pieces.index(b"1")], [pieces.index(b"1"), pieces.index(b"2")]):
        text = b"".join(pieces[t] or b"" for t in prefix)
        for token, piece in enumerate(pieces):
            longer = text + (piece or b"")
            expected = longer.isdigit() and len(longer) <= 2 and longer[:1] != b"0" and piece is not None
            if token == tokenizer.eos_token_id:
                expected = bool(text)
            assert constraint.accept(prefix, token) == expected
    assert constraint.with_eos([0]).accept([pieces.index(b"1")], 0)
    _refused(constraint, [pieces.index(b"1")], len(pieces))

    async def inside_another_loop() -> bool:
        return constraint.accept([], pieces.index(b"7"))

    assert asyncio.run(inside_another_loop())
    with pytest.raises(ValueError, match="not a potential over bytes"):
        PotentialConstraint(tokenizer, object())


@pytest.mark.parametrize("name", ["smollm2", "llama2", "qwen3"])
def test_real_vocabularies(name: str) -> None:
    tokenizer = real(name)
    constraint = JsonSchemaConstraint(tokenizer, schema=SCHEMA)
    pieces = token_bytes(tokenizer)
    text = b'{"age": 31}'
    prefix: list[int] = []
    at = 0
    while at < len(text):
        mask = constraint.mask(prefix)
        following = [i for i in mask.nonzero()[:, 0].tolist() if pieces[i] and text.startswith(pieces[i], at)]
        assert following
        for i in following[:20]:
            assert constraint.accept(prefix, i)
        prefix.append(max(following, key=lambda i: len(pieces[i])))
        at += len(pieces[prefix[-1]])
    assert constraint.accept(prefix, tokenizer.eos_token_id)
