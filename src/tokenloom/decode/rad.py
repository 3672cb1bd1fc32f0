"""RAD in `generate`: rewards of the k best tokens, and the training of the model that gives them.

reward = reward_model(trunk)                        # a causal LM with a head of one output, zero at first
fit(reward, texts, labels)                          # ids and labels in [0, 1]
model.generate(**inputs, do_sample=True, logits_processor=[decode.shaper("rad", reward=reward, tokenizer=tokenizer)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, Headed
from tokenloom.decode.hidden_states import evaluating, padded
from tokenloom.decode.minimize import Progress, minimize
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.rad import best_tokens, cumulative_mse, reward_augmented
from tokenloom.rollout.forward import base_model


@decoder("rad", kind="shaper")
class Rad(LogitsProcessor):
    """Add `beta` times the reward of each of the `k` best tokens to its score; all others become impossible.

    `reward` is a model of one output per token (see `reward_model`). With the model's own tokenizer candidates are read
    as one token more behind a cached prefix; with a `reward_tokenizer` the text is tokenized anew, and read from where
    it differs from what was read before. Special tokens are no text: their reward is that of the text before them.
    """

    def __init__(
        self,
        reward: Any,
        tokenizer: Any,
        reward_tokenizer: Any = None,
        *,
        k: int = 20,
        beta: float = 30.0,
        inverse: bool = False,
    ) -> None:
        """Raises ValueError for k < 1."""
        if k < 1:
            raise ValueError(f"rad needs k >= 1, got {k}")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.aux = Aux(reward, pad=-1 if pad is None else pad)
        self._tokenizer, self._reward_tokenizer = tokenizer, reward_tokenizer
        self._special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
        self.k, self.beta, self.inverse = k, beta, inverse

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the ids [B, T]."""
        given = wide(scores)
        candidates = best_tokens(given, self.k)
        rewards = self.rewards(self.aux.unpadded(input_ids), candidates).to(given)
        return reward_augmented(given, candidates, rewards, beta=self.beta, inverse=self.inverse).to(scores.dtype)

    def rewards(self, prefixes: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
        """The rewards [N, k] of `candidates` [N, k] behind prefixes (ids without padding)."""
        if self._reward_tokenizer is not None:
            return self._rewards_of_text(prefixes, candidates)
        before = _single(self.aux.scores(prefixes))
        after = _single(self.aux.candidates(prefixes, candidates))
        special = torch.isin(candidates, self._special.to(candidates.device)).to(after.device)
        return torch.where(special, before[:, None], after)

    def _rewards_of_text(self, prefixes: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
        texts = [
            self._tokenizer.decode([*prefix, token], skip_special_tokens=True)
            for prefix, tokens in zip(prefixes, candidates.tolist(), strict=True)
            for token in tokens
        ]
        ids = [[int(t) for t in self._reward_tokenizer(text)["input_ids"]] for text in texts]
        # A text without tokens, as a prompt of special tokens alone: nothing can be said, and all rewards are equal.
        found = torch.zeros(len(ids))
        some = [i for i, row in enumerate(ids) if row]
        if some:
            found[some] = _single(self.aux.scores([ids[i] for i in some])).cpu()
        return found.view(candidates.shape)


def reward_model(trunk: nn.Module) -> Headed:
    """A reward model: `trunk`, a causal LM whose own head is left off, under one output per token, zero at first."""
    causal: Any = base_model(trunk)
    weight = next(causal.parameters())
    head = nn.Linear(int(causal.config.get_text_config(decoder=True).hidden_size), 1, device=weight.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Headed(trunk, head.to(weight.dtype))


def fit(
    model: Headed,
    texts: Sequence[Sequence[int]],
    labels: Sequence[float] | Tensor,
    *,
    head_only: bool = False,
    epochs: int = 5,
    batch: int = 16,
    learning_rate: float = 1e-5,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train a reward model on texts (ids of its tokenizer) and `labels` [N] in [0, 1], by `rad/loss`.

    Dropout stays off. An `Aux` on the model must be reset afterwards.

    Raises:
        ValueError: for labels outside [0, 1] or of another number.
    """
    targets = torch.as_tensor(labels, dtype=torch.float32)
    if targets.shape != (len(texts),) or bool(((targets < 0) | (targets > 1)).any()):
        raise ValueError(f"rad's reward model needs one label in [0, 1] for each of {len(texts)} texts")
    parameters = list((model.head if head_only else model).parameters())
    device = parameters[0].device

    def loss(rows: list[int]) -> Tensor:
        ids, mask = padded([texts[i] for i in rows], device)
        rewards = _single(model(input_ids=ids, attention_mask=mask.long()).logits)
        return cumulative_mse(rewards, targets[rows].to(device), mask)

    with evaluating(model):
        minimize(
            parameters,
            len(texts),
            loss,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            progress=progress,
        )


def _single(output: Tensor) -> Tensor:
    if output.shape[-1] != 1:
        raise ValueError(
            f"rad needs a reward model of one output per token and got {output.shape[-1]}; make one by reward_model"
        )
    return output[..., 0].float()
