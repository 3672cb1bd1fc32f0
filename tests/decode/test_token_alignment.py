"""Token alignment under generate: the prompt's text stays, the law of the first token is the masked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decode.tokenizers_at_hand import byte_level, sentencepiece
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.decode.token_alignment import TokenAlignment, TokenAlignmentShaper
from tokenloom.decode.token_bytes import ByteVocabulary
from tokenloom.draw import Draw, law_of
from tokenloom.methods.decoding.token_alignment import aligned

V = 320
OPTIONS = {"eos_token_id": 1, "pad_token_id": 2, "max_new_tokens": 12}


def _padded(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [byte_level().encode("<s>" + t) for t in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


@pytest.mark.parametrize("backtrack", [0, 1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_text_goes_on_after_the_prompt(backtrack: int, sample: bool) -> None:
    model = tiny_llama(vocab=V)
    vocabulary = ByteVocabulary(byte_level())
    ids, mask = _padded(["the answ", "na\u00efv", "x"])
    seen = []
    loop = decode.loop("token-alignment", tokenizer=byte_level(), backtrack=backtrack)
    out = model.generate(ids, attention_mask=mask, do_sample=sample, top_k=0, custom_generate=loop, **OPTIONS)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for row, text in zip(out.tolist(), ["the answ", "na\u00efv", "x"], strict=True):
        seen.append(vocabulary.decode(row))
        assert seen[-1].startswith(text.encode())
    if backtrack == 0 and not sample:
        assert torch.equal(out, model.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS))


def test_reselecting_the_removed_token_is_ordinary_greedy() -> None:
    """A table that gives the removed token probability 1 and goes on with a fixed string."""
    tokenizer = byte_level()
    a, b = (ByteVocabulary(tokenizer).pieces.index(p) for p in (b"a", b"b"))
    string = [0, a, b, a, a, b, 1]
    size = len(tokenizer)
    model = TableLM(size, lambda prefix: [float(t == string[len(prefix)]) for t in range(size)])
    run = Run(model, torch.tensor([string[:3]]), [string[:3]], 10, frozenset([1]), 2, False)
    assert TokenAlignment(tokenizer).rows(run) == [string[3:]]


def test_the_first_law_is_the_masked_one() -> None:
    tokenizer = byte_level()
    pieces = ByteVocabulary(tokenizer).pieces
    prompt = [0, pieces.index(b"t")]
    model = TableLM.random(len(pieces), seed=3)
    keep = aligned(pieces, b"t")
    expected = model.probs((0,)) * keep
    expected /= expected.sum()
    ids = torch.tensor([prompt])

    def program(draw: Draw) -> tuple[int, ...]:
        return tuple(TokenAlignment(tokenizer).rows(Run(model, ids, [prompt], 1, frozenset(), 2, True, draw=draw))[0])

    law = law_of(program)
    longer = {i for i, p in enumerate(pieces) if p and p.startswith(b"t") and len(p) > 1}
    assert longer
    for i in longer:
        first = tuple(ByteVocabulary(tokenizer).encode_bytes(pieces[i][1:]))[:1]
        assert law[first] >= float(expected[i]) - 1e-9
    assert sum(law.values()) == pytest.approx(1.0)


def test_the_shaper_gives_what_the_loop_chooses() -> None:
    model = tiny_llama(vocab=V)
    tokenizer = byte_level()
    vocabulary = ByteVocabulary(tokenizer)
    ids = torch.tensor([tokenizer.encode("<s>the answ")])
    removed = vocabulary.pieces[int(ids[0, -1])]
    shaper = decode.build(
        "shaper", "token-alignment", {"tokenizer": tokenizer, "removed": [removed], "prompt_length": ids.shape[1] - 1}
    )
    theirs = model.generate(ids[:, :-1], do_sample=False, logits_processor=[shaper], **OPTIONS)
    loop = decode.loop("token-alignment", tokenizer=tokenizer)
    ours = model.generate(ids, do_sample=False, custom_generate=loop, **OPTIONS)
    shared = vocabulary.decode(theirs[0].tolist())
    assert vocabulary.decode(ours[0].tolist()).startswith(shared[:20])
    beams = model.generate(ids[:, :-1], do_sample=False, num_beams=3, logits_processor=[shaper], **OPTIONS)
    assert vocabulary.decode(beams[0].tolist()).startswith(b"the answ")


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_the_trie_allows_what_the_rule_allows(made: Any) -> None:
    vocabulary = ByteVocabulary(made())
    for remaining in (b"t", b"the", b" a", b"ab", b"\xe2\x82", b"answer is", b"\xff"):
        assert torch.equal(vocabulary.trie.compatible(remaining), aligned(vocabulary.pieces, remaining)), remaining


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        TokenAlignment(byte_level(), backtrack=-1)
    shaper = TokenAlignmentShaper(sentencepiece(), [b"a", b"b"], 1)
    with pytest.raises(ValueError, match="3 rows"):
        shaper(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 300))
    few = TokenAlignmentShaper(sentencepiece(), [b"S"], 1)
    with pytest.raises(ValueError, match="allows no token"):
        few(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 300), -torch.inf))
