"""CAAD as a logits processor, and the store of contexts and scores that a model gives for trusted examples.

The formula is in `methods.decoding.caad`. A text is embedded by the model's last hidden state of its last token, or by
an `embed` of the caller's, such as a sentence encoder behind the tokenizer. A store is kept as safetensors.

Letters: B rows, n stored contexts, E embedding size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, Headed, evaluating
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.caad import caad
from tokenloom.policy.own_logits import own_logits, run_trunk, trunk_of
from tokenloom.rollout.forward import base_model

Embed = Callable[[list[list[int]]], Tensor]
"""Embeddings [B, E] of B texts given as ids."""


@dataclass
class ContextStore:
    """Embeddings `keys` [n, E] of contexts, and the scores `values` [n, V] of what follows them."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def build(
        cls,
        model: Any,
        examples: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        embed: Embed | None = None,
        gold: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ContextStore:
        """A store of every position of the answers in `examples` (ids of a question and of its answer).

        `gold` raises the answer's own token to the highest score of its position. `progress(examples so far)` is called
        after each.

        Raises:
            ValueError: for no examples, or an empty question or answer.
        """
        if not examples or any(not len(question) or not len(answer) for question, answer in examples):
            raise ValueError("caad: a store takes at least one example, none with an empty question or answer")
        causal = base_model(model)
        keys, values = [], []
        for number, (question, answer) in enumerate(examples):
            text = [*question, *answer]
            ids = torch.tensor(text, device=next(causal.parameters()).device)
            with evaluating(model):
                hidden = run_trunk(trunk_of(causal), ids[None])[0, len(question) - 1 : -1]
                scores = wide(own_logits(causal, hidden)).clone()
            if gold:
                scores[torch.arange(len(answer)), ids[len(question) :]] = scores.amax(-1)
            prefixes = [text[:end] for end in range(len(question), len(text))]
            keys.append(wide(hidden) if embed is None else embed(prefixes))
            values.append(scores)
            if progress is not None:
                progress(number + 1)
        return cls(torch.cat(keys), torch.cat(values))

    def save(self, path: str | Path) -> None:
        """Keep the store as safetensors."""
        save_file({"keys": self.keys.contiguous(), "values": self.values.contiguous()}, path)

    @classmethod
    def load(cls, path: str | Path) -> ContextStore:
        """The store that `save` kept."""
        kept = load_file(path)
        return cls(kept["keys"], kept["values"])


@decoder("caad", kind="shaper")
class Caad(LogitsProcessor):
    """Adds scores from similar contexts of `store`, a `ContextStore` or the path of one that was saved.

    `model` embeds the texts unless `embed` does; it has to be what the store was built with.
    """

    def __init__(
        self,
        model: Any,
        store: Any,
        embed: Any = None,
        *,
        alpha: float = 0.5,
        top_n: int = 10,
        temperature: float = 0.1,
        threshold: float = 0.0,
    ) -> None:
        """See the class.

        Raises:
            ValueError: for a top_n below 1 or a temperature not above 0.
        """
        self.store: ContextStore = ContextStore.load(store) if isinstance(store, str | Path) else store
        self.aux = Aux(Headed(model, nn.Identity()))
        self._embed: Embed = self.aux.scores if embed is None else embed
        self._options: dict[str, Any] = {
            "alpha": alpha, "top_n": top_n, "temperature": temperature, "threshold": threshold,
        }  # fmt: skip
        caad(*torch.zeros(4, 1, 1), **self._options)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T].

        Raises:
            ValueError: when the store was built with another vocabulary.
        """
        keys, values = self.store.keys.to(scores.device), self.store.values.to(scores.device)
        if len(values) and values.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"caad: the store holds scores of {values.shape[-1]} tokens and the model has {scores.shape[-1]}; "
                "build it with the model that decodes"
            )
        contexts = self._embed(self.aux.unpadded(input_ids)).to(scores.device)
        return caad(wide(scores), contexts, keys, values, **self._options).to(scores.dtype)
