"""A complete run in miniature: a random character-level Llama, a JSONL task and a recipe, all in one folder.

The vocabulary holds few characters, so that a random model answers some problems right and training
steps have something to learn from; one of them is the escape character, since model output is hostile.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tiny_models import build

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
CHARACTERS = "0123+= \x1b"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}="


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """An ordinary Hugging Face folder `folder/tiny-model`: two layers of width 16, 12 tokens, a chat template."""
    path = folder / "tiny-model"
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    build(config, seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_tokenizer() -> Any:
    """One token a character; characters outside the vocabulary are unknown."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def tiny_problems(folder: Path, count: int = 24) -> Path:
    """`folder/problems.jsonl`: sums of three digits, the answer is whether they are odd (0 or 1)."""
    path = folder / "problems.jsonl"
    digits = itertools.islice(itertools.product(range(4), repeat=3), count)
    lines = [{"prompt": "+".join(map(str, three)), "answer": str(sum(three) % 2)} for three in digits]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, model: Path, *, verifier: str = "number", **sections: dict[str, Any]) -> Path:
    """`folder/tiny.yaml`: three steps of 4 prompts x 4 responses; `sections` update those of the recipe."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "description": "A random model learns nothing much, quickly.",
        "model": {"name": str(model)},
        "task": {"source": str(tiny_problems(folder)), "heldout": 8, "rewards": [{"verifier": verifier}], "workers": 1},
        "algorithm": {"preset": "grpo"},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 4},
        "train": {"steps": 3, "learning_rate": 0.01, "checkpoint_every": 1, "eval": {"samples": 2}},
        "log": {"tokens_every": 2, "tokens_rows": 4, "samples": 4},
    }
    for name, values in sections.items():
        recipe[name] |= values
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
