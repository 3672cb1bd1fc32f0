"""Antislop: what counts as an occurrence; exact laws on tables; models in batches; the cascade; the soft form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

from tests.tiny_models import TINY
from tokenloom import decode
from tokenloom.decode.antislop import Correction
from tokenloom.decode.bans import Bans, Found
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.draw import law_of

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


class Words:
    """Token i is the i-th of `pieces`; encodes by the longest piece."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(self.pieces[int(i)] for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len, default=None)
            if piece is None:
                return []
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids


def law(loop: Any, model: TableLM, length: int, prompt: tuple[int, ...] = (0,), **rest: Any) -> dict[Any, float]:
    def program(draw: Any) -> tuple[int, ...]:
        run = Run(
            model, torch.tensor([prompt]), [list(prompt)], limit=length, eos=frozenset(), pad=0, sample=True,
            draw=draw, **rest,
        )  # fmt: skip
        return tuple(loop.rows(run)[0])

    return law_of(program)


def starts(bans: Bans, text: str, since: int = 0) -> list[tuple[int, str]]:
    return [(f.start, f.what) for f in bans.found(text, since)]


def test_phrases_stand_alone() -> None:
    bans = Bans(["cat", "a test", "end["])
    assert starts(bans, "The CAT, a tests cation a test. concat cat") == [(4, "cat"), (24, "a test"), (39, "cat")]
    assert starts(bans, "end[more] bend[") == [(0, "end[")]
    assert starts(bans, "éctcat cät") == []
    assert starts(bans, "cat cat", 3) == [(4, "cat")]
    assert starts(bans, "cat cat", 2) == [(0, "cat"), (4, "cat")]
    assert bans.found("x a testy") == []
    assert Bans(["ab", "ab c"]).found("ab c") == [Found(0, 2, "ab"), Found(0, 4, "ab c")]
    assert Bans(["i̇x", "ab"]).found("İx ab") == [Found(3, 5, "ab")]  # one that grows in lower case


def test_ngrams_leave_stop_words_out_and_patterns_are_expressions() -> None:
    bans = Bans(ngrams=["voice whisper", ["Heart", "pounding"]])
    assert starts(bans, "Her voice was a Whisper; her heart's pounding, heart pounding") == [
        (4, "voice whisper"), (47, "heart pounding"),
    ]  # fmt: skip
    assert starts(bans, "voice whispered") == []
    bans = Bans(patterns=[r"not .*? but", "x*"])
    assert starts(bans, "It is NOT this but that") == [(6, "/not .*? but/")]
    assert bool(bans)
    assert not bool(Bans())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"phrases": [" "]}, "letters"),
        ({"phrases": {"a": 1.0}}, "scale"),
        ({"phrases": "cat"}, "list"),
        ({"ngrams": ["the of"]}, "stop words"),
        ({"patterns": ["("]}, "regular expression"),
    ],
)
def test_bad_bans_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Bans(**given)


TABLE = TableLM.random(4, seed=3)
PIECES = Words("a ", "b ", "c ", "d ")


def test_no_bans_are_ordinary_sampling() -> None:
    found = law(decode.loop("antislop", tokenizer=PIECES), TABLE, 3)
    assert found == pytest.approx(TABLE.string_law((0,), 3), abs=1e-12)


def test_a_banned_token_leaves_the_law_renormalized_at_every_step() -> None:
    found = law(decode.loop("antislop", tokenizer=PIECES, phrases=["b"]), TABLE, 3)
    expected = {s: 1.0 for s in TABLE.string_law((0,), 3) if 1 not in s}
    for s in expected:
        for t, token in enumerate(s):
            p = TABLE.probs((0, *s[:t]))
            expected[s] *= float(p[token] / (1 - p[1]))
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_banned_phrase_excludes_its_first_token_where_it_came_up() -> None:
    # Two tokens: "a c" is taken back to its a. Drawn again without a, the rest is the model's.
    found = law(decode.loop("antislop", tokenizer=PIECES, phrases=["a c"]), TABLE, 2)
    plain = TABLE.string_law((0,), 2)
    first = TABLE.probs((0,))
    expected = {
        s: p + plain[0, 2] * (float(first[s[0]] / (1 - first[0]) * TABLE.probs((0, s[0]))[s[1]]) if s[0] else 0.0)
        for s, p in plain.items()
        if s != (0, 2)
    }
    assert found == pytest.approx(expected, abs=1e-9)


def test_nothing_banned_is_ever_said_when_something_else_can_be() -> None:
    # No ban begins with c, which so can stand anywhere.
    loop = decode.loop("antislop", tokenizer=PIECES, phrases=["a b"], ngrams=["b b"], patterns=["a . a"])
    table = TableLM.random(3, seed=4)
    found = law(loop, table, 3)
    clean = [s for s in table.string_law((0,), 3) if not loop.bans.found(PIECES.decode(s))]
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert set(found) == set(clean)


def test_where_nothing_else_is_possible_the_occurrence_is_allowed() -> None:
    only = TableLM(2, lambda prefix: (1.0, 0.0) if len(prefix) % 2 else (0.5, 0.5))
    loop = decode.loop("antislop", tokenizer=PIECES, phrases=["a"])
    assert law(loop, only, 2) == {(0, 1): 1.0}
    run = Run(only, torch.tensor([[0]]), [[0]], limit=2, eos=frozenset(), pad=0, sample=False)
    assert loop.rows(run) == [[0, 1]]
    assert run.counts == {"backtracks": 2.0, "allowed": 1.0}
    assert loop.corrections == [Correction([0, 0], [0], 1)]


def test_truncation_is_given_up_before_a_ban() -> None:
    table = TableLM(4, lambda prefix: (0.4, 0.3, 0.2, 0.1))
    loop = decode.loop("antislop", tokenizer=PIECES, phrases=["a", "b"])
    assert law(loop, table, 1, processors=[TopKLogitsWarper(3)]) == pytest.approx({(2,): 1.0})
    found = law(loop, table, 1, processors=[TopKLogitsWarper(2)])
    assert found == pytest.approx({(2,): 2 / 3, (3,): 1 / 3}, abs=1e-6)


def test_a_place_gives_up_after_its_retries() -> None:
    loop = decode.loop("antislop", tokenizer=PIECES, phrases=["a", "b", "c"], retries=2)
    found = law(loop, TABLE, 1)
    assert set(found) == {(0,), (1,), (2,), (3,)}
    patient = decode.loop("antislop", tokenizer=PIECES, phrases=["a", "b", "c"])
    assert law(patient, TABLE, 1) == pytest.approx({(3,): 1.0}, abs=1e-12)
    short = decode.loop("antislop", tokenizer=PIECES, phrases=["a c"], history=1)
    assert law(short, TABLE, 2) == pytest.approx(TABLE.string_law((0,), 2), abs=1e-12)


def test_the_soft_form_goes_back_only_if_something_else_has_become_likelier() -> None:
    table = TableLM(4, lambda prefix: (0.6, 0.2, 0.1, 0.1))
    loose = decode.loop("antislop", tokenizer=PIECES, phrases={"a": 0.5})
    assert law(loose, table, 1) == pytest.approx({(0,): 0.6, (1,): 0.2, (2,): 0.1, (3,): 0.1}, abs=1e-9)
    # 0.6 x 0.25 = 0.15 is below 0.2: drawn again from (.15, .2, .1, .1) / .55, and once more from (.0375, ...) ...
    found = law(decode.loop("antislop", tokenizer=PIECES, phrases={"a": 0.5}, strength=2.0, retries=1), table, 1)
    again = 0.6 / 0.55
    assert found == pytest.approx({(0,): 0.15 * again, (1,): 0.2 + 0.2 * again, (2,): 0.1 + 0.1 * again,
                                   (3,): 0.1 + 0.1 * again}, abs=1e-9)  # fmt: skip


def test_the_soft_form_reaches_all_beginnings_of_the_phrase() -> None:
    pieces = Words("ab", "a", "b", " ab", " ", "A")
    table = TableLM(6, lambda prefix: (0.4, 0.3, 0.1, 0.1, 0.05, 0.05))
    loop = decode.loop("antislop", tokenizer=pieces, phrases={"ab": 0.1}, retries=1)
    run = Run(table, torch.tensor([[0]]), [[0]], limit=1, eos=frozenset(), pad=0, sample=False)
    assert loop.rows(run) == [[2]]  # all but "b" and " " are made rarer: .04 .03 .1 .01 .05 .005


class Letters(Words):
    """Special tokens say nothing."""

    def decode(self, ids: Any, **_: Any) -> str:
        return super().decode([i for i in ids if int(i) > 2])


LETTERS = Letters(*(chr(97 + i % 26) + " " * (i % 3 == 0) for i in range(64)))


@pytest.mark.parametrize("name", sorted(TINY))
def test_greedy_without_bans_is_generate(name: str) -> None:
    model = TINY[name]()
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 10}
    ours = model.generate(IDS, custom_generate=decode.loop("antislop", tokenizer=LETTERS), **given)
    assert torch.equal(ours, model.generate(IDS, **given))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rows_go_back_on_their_own(name: str) -> None:
    model = TINY[name](seed=8)
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
    plain = model.generate(IDS, attention_mask=MASK, **given)
    said = [LETTERS.decode(row) for row in plain[:, 5:].tolist()]
    patterns = [said[0][2:5], said[1][4:7], said[2][1:4], said[0][6:9]]
    loop = decode.loop("antislop", tokenizer=LETTERS, patterns=[p.replace(" ", r"\s") for p in patterns])
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **given)
    assert loop.last_run.counts["backtracks"] >= 3
    assert loop.last_run.counts["allowed"] == 0
    for row in range(3):
        assert not loop.bans.found(LETTERS.decode(ours[row, 5:]))
    corrections = loop.corrections
    for c in corrections:
        assert c.chosen not in c.rejected
        with torch.no_grad():
            ranked = model(input_ids=torch.tensor([c.prefix])).logits[0, -1].argsort(descending=True).tolist()
        assert ranked[: len(c.rejected) + 1] == [*c.rejected, c.chosen]
    for row in range(3):
        alone = IDS[row][MASK[row].bool()][None]
        single = model.generate(alone, custom_generate=loop, **given)[0, alone.shape[1] :]
        assert ours[row, 5 : 5 + len(single)].tolist() == single.tolist()


def test_characters_that_take_several_tokens() -> None:
    class Bytes(Words):
        def decode(self, ids: Any, **_: Any) -> str:
            return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    text = "né".encode()
    table = TableLM(200, lambda p: [0.9 if i == text[len(p) - 1] else 0.1 / 199 for i in range(200)])
    loop = decode.loop("antislop", tokenizer=Bytes(), phrases=["né"])
    run = Run(table, torch.tensor([[0]]), [[0]], limit=3, eos=frozenset(), pad=0, sample=False)
    assert loop.rows(run) == [[0, *text[1:]]]
    assert run.counts["backtracks"] == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs tokenizer"):
        decode.loop("antislop")
    with pytest.raises(ValueError, match="retries"):
        decode.loop("antislop", tokenizer=LETTERS, retries=0)
    with pytest.raises(ValueError, match="scale"):
        decode.loop("antislop", tokenizer=LETTERS, phrases={"cat": 2.0})
