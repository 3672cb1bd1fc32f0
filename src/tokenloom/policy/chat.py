"""Prompts as token ids, and which ids end a response."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> Tensor:
    """int64 [P]: chat messages through the chat template, ready for the assistant's answer; a text as it is.

    Without a chat template, the messages' contents are joined by blank lines.

    Raises:
        ValueError: when there is no tokenizer or nothing remains to condition on.
    """
    if tokenizer is None:
        raise ValueError("this policy has no tokenizer: give prompts as token ids, or load a model that has one")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        log.info("the tokenizer has no chat template: messages are joined by blank lines")
        ids = tokenizer("\n\n".join(m["content"] for m in prompt))["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; a model needs at least one to continue from")
    return torch.tensor(ids, dtype=torch.int64)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a response: of the generation config, the config and the tokenizer together."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), _text_config(model), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found |= {int(v) for v in (value if isinstance(value, (list, tuple)) else [value])}
    return frozenset(found)


def padding_id(model: Any, tokenizer: Any) -> int:
    """An id to fill unused places with; which one never matters to results."""
    for holder in (tokenizer, getattr(model, "generation_config", None), _text_config(model)):
        value = getattr(holder, "pad_token_id", None)
        if isinstance(value, int) and 0 <= value < int(_text_config(model).vocab_size):
            return value
    return min(end_ids(model, tokenizer), default=0)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
