"""A policy with no more than the rollout engine asks for, and a small tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class StandIn:
    """The attributes of a `Policy` that sampling uses."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        ends: Iterable[int] = (1,),
        pad: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.pad_id, self.bf16 = model, tokenizer, pad, bf16
        self.eos_ids = frozenset(ends)
        self.device = torch.device("cpu")

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def encode_prompt(self, prompt: str | Sequence[dict[str, str]]) -> Tensor:
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return torch.tensor(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens: 256 bytes, some merges, end token 1 and turn token 0."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the answer is 12, and the other one is 34.\n", "<calc>1+2</calc><result>3</result> STOP here\n"]
    made.train_from_iterator(text * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


def count_calls(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """A list that grows by the shape of `input_ids` at every forward call of `model`."""
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return calls


def full_logprobs(model: Any, prompt: Tensor, response: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of `response` after `prompt`, by one forward without cache or padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
