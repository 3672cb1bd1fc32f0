"""Stop strings are found at the token that completes them, whatever the token boundaries."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rollout.stand_in import small_tokenizer
from tokenloom.rollout.stopping import StopStrings

BYTES = small_tokenizer()


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: blanks inside tokens, the first one dropped, unknown bytes as tokens."""
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "S", "T", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "ab", "\u2581b", "ST"])}
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "b"), ("S", "T")]
    made = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def first_hit(tokenizer: PreTrainedTokenizerFast, stop: list[str], ids: list[int]) -> int | None:
    watch = StopStrings(tokenizer, stop)
    return next((i for i, token in enumerate(ids) if watch.push(token)), None)


def by_decoding_everything(tokenizer: PreTrainedTokenizerFast, stop: list[str], ids: list[int]) -> int | None:
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if any(s in text for s in stop):
            return i
    return None


@pytest.mark.parametrize("stop", ["STOP", "</calc>", "r is 1", "\n", "e", "<|im_end|>", "é", "日本"])
def test_found_across_token_boundaries(stop: str) -> None:
    text = f"the other é 日 thing{stop}and more"
    for ids in (BYTES(text)["input_ids"], [t for c in text for t in BYTES(c)["input_ids"]]):
        expected = by_decoding_everything(BYTES, [stop], ids)
        assert expected is not None
        assert first_hit(BYTES, [stop], ids) == expected


@pytest.mark.parametrize("tokenizer", [BYTES, metaspace_tokenizer()], ids=["bytes", "metaspace"])
def test_equals_decoding_everything_on_random_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    # Random ids are full of broken characters and odd boundaries; stop strings that often occur.
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(150):
        ids = torch.randint(0, len(tokenizer), (25,), generator=generator).tolist()
        if tokenizer is not BYTES:
            ids = [i if i % 3 else 258 + i % 9 for i in ids]  # more letters than bytes
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        clean = [text[i : i + 3] for i in range(len(text) - 2) if "\ufffd" not in text[i : i + 3]]
        stop = [clean[len(clean) // 2], "ab S"] if clean else ["ab S"]
        expected = by_decoding_everything(tokenizer, stop, ids)
        assert first_hit(tokenizer, stop, ids) == expected
        hits += expected is not None
    assert hits > 50


def test_several_stop_strings_of_different_lengths() -> None:
    ids = BYTES("one two three")["input_ids"]
    assert first_hit(BYTES, ["three", "tw"], ids) == by_decoding_everything(BYTES, ["three", "tw"], ids)
    assert first_hit(BYTES, ["absent", "x"], ids) is None
