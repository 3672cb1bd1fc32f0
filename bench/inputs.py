"""Models and prompts that all sides of a row share: made once, kept in the cache folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

from tokenloom.policy.builtin import builtin_folder
from tokenloom.policy.cache import build_once, cache_folder

SMOLLM2 = "smollm2"
"""The built-in SmolLM2-135M-Instruct; `random-V` is a small random Llama with a vocabulary of V words."""

STUDENT = cache_folder() / "bench" / "student-v1"
"""Where `bench.student` keeps the draft model."""
STUDENT_INSTALL = "no draft model yet; make it with: python -m bench.student (half an hour on two cores)"

# Common words that SmolLM2's tokenizer writes as one token each, with the space before.
_TEXT = (
    "the time and people of this world are in a way that makes them think about their work every day so we have to "
    "know what they need from us when it is late at night or early before school while many others go home by train"
)


def model_folder(name: str) -> Path:
    """An ordinary Hugging Face folder of the model `name`.

    Raises:
        ValueError: for a name that is neither `smollm2` nor `random-V`.
    """
    if name == SMOLLM2:
        return builtin_folder("smollm2-135m-instruct")
    kind, _, size = name.partition("-")
    if kind != "random" or not size.isdecimal():
        raise ValueError(f"unknown model {name!r}; known: {SMOLLM2} and random-V, such as random-8192")
    return build_once(cache_folder() / "bench" / f"{name}-v1", lambda folder: _random_llama(folder, int(size)))


def prompts(name: str, count: int, tokens: int) -> list[str]:
    """`count` different plain texts, each of exactly `tokens` tokens for the model `name`.

    Raises:
        ValueError: when the tokenizer counts otherwise.
    """
    from transformers import AutoTokenizer

    draw = random.Random(tokens)
    words = _TEXT.split() if name == SMOLLM2 else [f"w{i}" for i in range(3, 500)]
    texts = [" " * (name == SMOLLM2) + " ".join(draw.choices(words, k=tokens)) for _ in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    if lengths != {tokens}:
        raise ValueError(f"prompts of {tokens} tokens came out as {sorted(lengths)}: the tokenizer has changed")
    return texts


def prompt_file(name: str, count: int, tokens: int) -> Path:
    """A JSON file of the token ids of `prompts`, for sides that have no tokenizer at hand."""
    from transformers import AutoTokenizer

    texts = prompts(name, count, tokens)
    path = cache_folder() / "bench" / f"prompts-{name}-{count}x{tokens}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(AutoTokenizer.from_pretrained(model_folder(name))(texts)["input_ids"]), encoding="utf-8")
    return path


def _random_llama(folder: Path, vocabulary: int) -> None:
    """8 layers of width 256, tied embeddings: quick enough to time many sizes with every side."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = {word: i for i, word in enumerate([*special.values(), *(f"w{i}" for i in range(3, vocabulary))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
