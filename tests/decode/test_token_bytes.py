"""The bytes of tokens: joined, they are the text, whatever the tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from decode.tokenizers_at_hand import byte_level, real, sentencepiece
from tokenloom.decode.token_bytes import ByteVocabulary, TokenTrie, token_bytes

TEXTS = [
    "the answer is 12",
    " leading", "two  blanks", "tab\tand\nlines\n\n", 
    "caf\u00e9 na\u00efve", "\u20ac and \U0001f600\U0001f468\u200d\U0001f469",
    "\u6f22\u5b57", "a", "\u2581 itself", "<0x41> literally", "mixed \u00e9\u00e9 end ",
]  # fmt: skip
REAL = ["smollm2", "llama2", "gemma3", "qwen3"]


def _joins(tokenizer: Any, texts: list[str]) -> None:
    vocabulary = ByteVocabulary(tokenizer)
    blank = b" " if vocabulary.leading_blank else b""
    for text in texts:
        ids = vocabulary.encode(text)
        if "\u2581" in text and "\u2581".encode() not in vocabulary.decode(ids):
            continue  # SentencePiece writes a blank for it, so the text is lost before we see it
        # Some write it only where the text has none.
        assert vocabulary.decode(ids) in {blank + text.encode(), blank + text.lstrip().encode()}, text
        assert vocabulary.decode(vocabulary.encode_bytes(text.encode())) == text.encode(), text
    half = "x\u20ac".encode()[:-1]
    assert vocabulary.decode(vocabulary.encode_bytes(half)) == half


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_tokens_of_small_tokenizers_join_to_the_text(made: Any) -> None:
    _joins(made(), TEXTS)


@pytest.mark.parametrize("name", REAL)
def test_tokens_of_real_tokenizers_join_to_the_text(name: str) -> None:
    tokenizer = real(name)
    rng = random.Random(0)
    alphabet = "ab \u00e9\u20ac\n\t'\"{}:,.0123TheThe \U0001f600"
    _joins(tokenizer, TEXTS + ["".join(rng.choices(alphabet, k=30)) for _ in range(40)])


def test_special_and_fallback_tokens() -> None:
    pieces = token_bytes(sentencepiece(), size=300)
    assert pieces[:3] == [None, None, None]
    assert pieces[3 + 0x41] == b"A"
    assert pieces[259] == b" "
    assert pieces[264] == b" a"
    assert len(pieces) == 300
    assert pieces[-1] is None
    assert ByteVocabulary(sentencepiece()).leading_blank
    assert not ByteVocabulary(byte_level()).leading_blank
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.add_tokens(["<\u00e9>"])
    assert token_bytes(tokenizer)[-1] == "<\u00e9>".encode()


def test_what_has_no_bytes_is_refused() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="fast"):
        token_bytes(object())


def test_the_trie_equals_a_scan() -> None:
    pieces = [None, b"a", b"ab", b"abc", b"b", b"\xff", b"\xff\xff", b"ab", b"", b"\xffa"]
    trie = TokenTrie(pieces)
    for prefix in (b"", b"a", b"ab", b"abcd", b"\xff", b"\xff\xff", b"z"):
        places = trie.starting_with(prefix)
        expected = {i for i, p in enumerate(pieces) if p and p.startswith(prefix)}
        assert {int(trie.order[n]) for n in places} == expected, prefix
        both = {i for i, p in enumerate(pieces) if p and (p.startswith(prefix) or prefix.startswith(p))}
        assert set(trie.compatible(prefix).nonzero()[:, 0].tolist()) == both, prefix
    assert trie.exactly(b"ab") == [2, 7]
    assert trie.longest(b"abcab\xff\xffa") == [3, 2, 6, 1]
    with pytest.raises(ValueError, match="b'z'"):
        trie.longest(b"az")
