"""Rectification in `generate`: caps from a value model, and the value model's training.

values = value_model(trunk, vocab)                          # a causal LM with V outputs, all values 0 (safe) at first
fit(values, prompts, completions, undesired)                # texts (ids) and which of them are undesired
model.generate(**inputs, do_sample=True, logits_processor=[decode.shaper("rectification", values=values)])
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, Headed, aligned
from tokenloom.decode.hidden_states import evaluating, padded
from tokenloom.decode.minimize import Progress, minimize
from tokenloom.decode.nado import odds_model, response_places, texts_of
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.rectification import feasible, rectify, sarsa_loss


@decoder("rectification", kind="shaper")
class Rectification(LogitsProcessor):
    """Cap each token's probability by how safe the text behind it is, as a value model says.

    `values` is a model of V outputs per token (see `value_model`), with the decoded model's tokenizer. Where the caps
    leave no law (a dead end) they are broken evenly: `dead_ends` counts such rows, and the first one warns.
    """

    def __init__(self, values: Any, *, epsilon: float = 0.1, rounds: int = 2) -> None:
        """Raises ValueError unless rounds >= 1 and 0 <= epsilon <= 1."""
        rectify(torch.zeros(1, 1), torch.zeros(1, 1), epsilon=epsilon, rounds=rounds)
        self.aux, self.epsilon, self.rounds = Aux(values), epsilon, rounds
        self.dead_ends = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the ids [B, T]."""
        given = wide(scores)
        # Ids that only fill up the decoded model's vocabulary are not safe: they would hide dead ends.
        values = aligned(self.aux.next(input_ids), given.shape[1]).to(given)
        lost = int((~feasible(given, values, epsilon=self.epsilon)).sum())
        if lost and not self.dead_ends:
            warnings.warn(
                "rectification reached a dead end: the caps of all possible tokens sum to less than 1 and cannot be "
                "kept. Lower epsilon, or allow more tokens (a larger top-k or top-p)",
                stacklevel=2,
            )
        self.dead_ends += lost
        return rectify(given, values, epsilon=self.epsilon, rounds=self.rounds).to(scores.dtype)


def value_model(trunk: nn.Module, vocab: int) -> Headed:
    """`trunk`, a causal LM whose own head is left off, under `vocab` outputs per token, zero (all safe) at first."""
    return odds_model(trunk, vocab)


def fit(
    values: Headed,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    undesired: Sequence[bool] | Tensor,
    *,
    gamma: float = 1.0,
    polyak: float = 0.1,
    epochs: int = 3,
    batch: int = 64,
    learning_rate: float = 3e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train a value model on texts (ids) by `rectification/loss`; `undesired` [N] may be probabilities.

    The copy that gives targets moves by the share `polyak` after each step. Dropout stays off. An `Aux` on the model
    must be reset afterwards.

    Raises:
        ValueError: for an empty prompt or completion, labels outside [0, 1], or different numbers of them.
    """
    rewards = -torch.as_tensor(undesired, dtype=torch.float32)
    texts = texts_of("rectification", prompts, completions)
    if rewards.shape != (len(texts),) or bool(((rewards > 0) | (rewards < -1)).any()):
        raise ValueError(f"rectification needs one label in [0, 1] for each of {len(texts)} texts")
    follower = copy.deepcopy(values)
    parameters = list(values.parameters())
    device = parameters[0].device

    def loss(rows: list[int]) -> Tensor:
        ids, mask = padded([texts[i] for i in rows], device)
        at, tokens, inside = response_places([len(prompts[i]) for i in rows], ids, mask)

        def chosen(model: Headed) -> Tensor:
            output = model(input_ids=ids, attention_mask=mask.long()).logits.float()
            # Two gathers: first the places, then the tokens, without a [B, T, V] in between.
            rows_at = torch.arange(len(ids), device=device)[:, None]
            found: Tensor = output[rows_at, at, tokens]
            return found

        with torch.no_grad():
            following = chosen(follower)
        return sarsa_loss(chosen(values), following, rewards[rows].to(device), inside, gamma=gamma)

    @torch.no_grad()
    def follow() -> None:
        for mine, theirs in zip(values.parameters(), follower.parameters(), strict=True):
            theirs.lerp_(mine, polyak)

    with evaluating(values), evaluating(follower):
        minimize(
            parameters,
            len(texts),
            loss,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            after=follow,
            progress=progress,
        )
