"""Byte-level decoding through sessions and tokenizers: exact against brute force, consistent on real tokenizers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from decode.tokenizers_at_hand import byte_level, real, sentencepiece
from tests.tiny_models import tiny_llama, tiny_qwen3
from tokenloom import decode
from tokenloom.decode.byte_level import ByteLevel, ByteTokens, next_byte_probabilities, open_bytes
from tokenloom.decode.session import open_session
from tokenloom.decode.unbiased_next_character import next_character_law, token_law
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.byte_level_probabilities import END
from tokenloom.methods.decoding.unbiased_next_character import branch_and_pass

V = 320
OFF = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": 1, "pad_token_id": 2}


def _probability(model: Any, context: list[int], ids: tuple[int, ...]) -> float:
    total = 1.0
    for n, token in enumerate(ids):
        total *= float(token_law(model, context)(ids[:n])[token])
    return total


def _brute(model: Any, tokens: ByteTokens, context: list[int], data: bytes, canonical: bool) -> torch.Tensor:
    """P(data + byte) for every byte and the end, over all token sequences (or the canonical ones)."""
    total = torch.zeros(257, dtype=torch.float64)
    pending: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
    law_after = token_law(model, context)
    while pending:
        ids, written, mass = pending.pop()
        law = law_after(ids)
        if written == data:
            total[END] += mass * float(law[1])
        for token, piece in enumerate(tokens.pieces):
            if not piece:
                continue
            longer = written + piece
            if longer[: len(data)] != data[: len(longer)]:
                continue
            if canonical and not tokens.canonical([(*ids, token)])[0]:
                continue
            if len(longer) > len(data):
                total[longer[len(data)]] += mass * float(law[token])
            else:
                pending.append(((*ids, token), longer, mass * float(law[token])))
    return total


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
@pytest.mark.parametrize("mode", ["all", "canonical"])
def test_laws_equal_brute_force(made: Any, mode: Any) -> None:
    tokenizer = made()
    model = tiny_llama(vocab=V)
    tokens = ByteTokens(tokenizer, V)
    data = b" ab" if made is sentencepiece else b"the"
    prompt = [0, *tokens.vocabulary.encode_bytes(data)]
    with open_bytes(model, tokens, prompt, [1], mode=mode, prune=0.0, tail=0.0) as state:
        ours = state.cover.masses()
    expected = _brute(model, tokens, [0], data, mode == "canonical")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)
    assert float(expected.sum()) > 0


def test_the_end_of_the_prompts_last_token_does_not_matter() -> None:
    """Any tokenization of the prompt's last word gives the same law: the text is what counts."""
    tokenizer = byte_level()
    model = tiny_llama(vocab=V)
    tokens = ByteTokens(tokenizer, V)
    whole = tokens.vocabulary.encode("the answer")
    single = tokens.vocabulary.encode("the") + [tokens.pieces.index(bytes([b])) for b in b" answer"]
    assert whole != single
    split = tokens.split(whole)
    assert split > 0
    laws = []
    for ids in (
        whole,
        whole[:split] + tokens.vocabulary.encode_bytes(b" answ") + tokens.vocabulary.encode_bytes(b"er"),
    ):
        with open_bytes(model, tokens, ids, [1], mode="all", prune=0.0) as state:
            laws.append(state.law())
    torch.testing.assert_close(laws[0], laws[1], rtol=1e-3, atol=1e-7)
    assert float(laws[0].sum()) == pytest.approx(1.0)


def test_sessions_reuse_gives_what_fresh_forwards_give() -> None:
    tokenizer = byte_level()
    model = tiny_qwen3(vocab=V)
    tokens = ByteTokens(tokenizer, V)
    with open_bytes(model, tokens, tokens.vocabulary.encode("on the"), [1], mode="all", prune=0.0) as state:
        for byte in b" answer":
            state.advance(byte)
        for branch in state.cover.branches:
            context = list(state._session.rows[state._row[branch.ids]])
            with open_session(model, [context]) as fresh:
                law = fresh.start()[0].double().softmax(-1)[tokens.sorted.ids]
            ours = branch.cumulative.diff()
            torch.testing.assert_close(ours / ours.sum(), law / law.sum(), rtol=1e-3, atol=1e-6)


def test_a_prompt_that_ends_inside_a_character_is_the_same_to_all_models(monkeypatch: Any) -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=V)
    tokens = ByteTokens(tokenizer, V)
    prompt = [*tokens.vocabulary.encode("the caf"), tokens.pieces.index(b"\xe2"), tokens.pieces.index(b"\x82")]
    seen: list[torch.Tensor] = []

    def mean(laws: torch.Tensor) -> torch.Tensor:
        seen.append(laws)
        return laws.mean(0)

    monkeypatch.setattr("tokenloom.decode.byte_level.mean_law", mean)
    loop = decode.loop("byte-level-probabilities", tokenizer=tokenizer, others=[(model, tokenizer)], mode="all")
    model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=2, custom_generate=loop, **OFF)
    assert len(seen) == 2
    for one, other in seen:
        torch.testing.assert_close(one[:END], other[:END], rtol=1e-3, atol=1e-6)
    seen.clear()
    model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=2, custom_generate=loop,
                   **OFF | {"eos_token_id": None})  # fmt: skip
    assert [laws[:, END].tolist() for laws in seen] == [[0.0, 0.0]] * 2, "without an end token nothing ends"


def test_a_text_without_tokens_is_an_error() -> None:
    for find in (next_byte_probabilities, lambda *given: next_character_law(*given, "ab")):
        with pytest.raises(ValueError, match=r"no tokens.*start token"):
            find(tiny_llama(vocab=V), byte_level(), "")


@pytest.mark.parametrize("name", ["smollm2", "llama2", "qwen3"])
def test_canonical_by_the_last_word_is_canonical_as_a_whole(name: str) -> None:
    tokenizer = real(name)
    tokens = ByteTokens(tokenizer)
    rng = random.Random(0)
    words = ["the", "answer", "token", "izer", "s", " ", "\n", "12", "'s", "x", "caf\u00e9", "(", "return"]
    for _ in range(60):
        text = "".join(rng.choice(["", " "]) + rng.choice(words) for _ in range(6)).strip()
        ids = tokens.vocabulary.encode(text)
        assert tokens.canonical([ids]) == [True], text
        at = rng.randrange(tokens.split(ids), len(ids))
        piece = tokens.pieces[ids[at]] or b""
        halves = tokens.vocabulary.encode_bytes(piece[:1]) + tokens.vocabulary.encode_bytes(piece[1:])
        spoiled = [*ids[:at], *halves, *ids[at + 1 :]]
        whole = tokens.vocabulary.decode(spoiled).decode()
        blank = whole[1:] if tokens.vocabulary.leading_blank and whole.startswith(" ") else whole
        assert tokens.canonical([spoiled]) == [tokens.vocabulary.encode(blank) == spoiled], text


def test_the_loop_writes_text_that_goes_on() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=V)
    ids = torch.tensor([tokenizer.encode("<s>the answ")])
    loop = decode.loop("byte-level-probabilities", tokenizer=tokenizer)
    out = model.generate(ids, do_sample=False, max_new_tokens=12, custom_generate=loop, **OFF)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    text = ByteTokens(tokenizer).vocabulary.decode(out[0].tolist())
    assert text == b"the answ" + loop.texts[0]
    assert len(loop.texts[0]) <= 12
    tokens = ByteTokens(tokenizer, V)
    with open_bytes(model, tokens, ids[0].tolist(), [1]) as state:
        for byte in loop.texts[0]:
            assert int(state.law().argmax()) == byte
            state.advance(byte)


def test_an_ensemble_of_two_tokenizers_averages_bytes() -> None:
    one, two = byte_level(), sentencepiece()
    first, second = tiny_llama(vocab=V), tiny_qwen3(vocab=V, seed=1)
    first.generation_config.eos_token_id, second.generation_config.eos_token_id = 1, 2
    ids = torch.tensor([one.encode("<s>ab")])
    seen: list[torch.Tensor] = []

    class Spy(RandomDraw):
        def categorical(self, p: torch.Tensor) -> int:
            seen.append(p)
            return int(p.argmax())

    loop = ByteLevel(one, [(second, two)])
    loop.draw = Spy()
    first.generate(ids, do_sample=True, max_new_tokens=1, custom_generate=loop, **OFF)
    laws = []
    for model, tokenizer, prompt, eos in ((first, one, ids[0].tolist(), [1]), (second, two, two.encode("ab"), [2])):
        with open_bytes(model, ByteTokens(tokenizer, V), prompt, eos) as state:
            laws.append(state.law())
    torch.testing.assert_close(seen[0], (laws[0] + laws[1]) / 2, rtol=1e-6, atol=1e-12)


def test_next_characters() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=V)
    model.generation_config.eos_token_id = 1
    law = next_byte_probabilities(model, tokenizer, "the answ")
    assert law.shape == (257,)
    assert float(law.sum()) == pytest.approx(1.0)
    characters = next_character_law(model, tokenizer, "the answ", ["e", "x"])
    assert characters["e"] == pytest.approx(float(law[ord("e")]), rel=1e-6)
    longer = next_character_law(model, tokenizer, "the answ", ["e", "\u20ac"])
    assert longer["e"] == pytest.approx(characters["e"], rel=1e-6)
    assert 0 < longer["\u20ac"] < float(law["\u20ac".encode()[0]])
    with pytest.raises(ValueError, match="not one character"):
        next_character_law(model, tokenizer, "the answ", ["ab"])
    pieces = ByteTokens(tokenizer, V).pieces
    direct = branch_and_pass(token_law(model, [0]), pieces, b"q")
    assert direct == pytest.approx(
        sum(float(token_law(model, [0])(())[i]) for i, p in enumerate(pieces) if p and p.startswith(b"q")), rel=1e-9
    )


def test_bad_input() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=V)
    loop = decode.loop("byte-level-probabilities", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="TopKLogitsWarper"):
        model.generate(
            torch.tensor([[0, 9]]), do_sample=True, max_new_tokens=2, custom_generate=loop, **(OFF | {"top_k": 5})
        )
    with pytest.raises(ValueError, match="out of range"):
        decode.loop("byte-level-probabilities", tokenizer=tokenizer, top_p=0.0)
    letters = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    letters.decoder = decoders.Fuse()
    few = ByteTokens(PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>"), V)
    with open_bytes(model, few, [0, 2], [1], mode="all") as state:
        state.advance(ord("b"))
        with pytest.raises(ValueError, match="cannot write b'z'"):
            state.advance(ord("z"))
