"""NADO in `generate`: a head's odds that the oracle will agree, and their training on the model's own texts.

head = odds_model(trunk, vocab)                             # a causal LM with V outputs, all odds equal at first
fit(head, model, prompts, completions, labels)              # completions sampled from `model`, labels by the oracle
model.generate(**inputs, do_sample=True, logits_processor=[decode.shaper("nado", head=head)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, Headed, aligned
from tokenloom.decode.hidden_states import evaluating, padded
from tokenloom.decode.minimize import Progress, minimize
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.nado import nado, nado_loss
from tokenloom.rollout.forward import base_model


@decoder("nado", kind="shaper")
class Nado(LogitsProcessor):
    """Weigh each token by a head's odds that an oracle will accept the finished text.

    `head` is a model of V outputs per token (see `odds_model`), with the decoded model's tokenizer.
    """

    def __init__(self, head: Any, *, alpha_p: float = 1.0, alpha: float = 1.0) -> None:
        self.aux, self.alpha_p, self.alpha = Aux(head), alpha_p, alpha

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the ids [B, T]."""
        given = wide(scores)
        # Ids that only fill up the decoded model's vocabulary have no odds, and must not look better than those with.
        odds = aligned(self.aux.next(input_ids), given.shape[1]).to(given)
        return nado(given, odds, alpha_p=self.alpha_p, alpha=self.alpha).to(scores.dtype)


def odds_model(trunk: nn.Module, vocab: int) -> Headed:
    """`trunk`, a causal LM whose own head is left off, under `vocab` outputs per token, zero (odds 1/2) at first."""
    causal: Any = base_model(trunk)
    weight = next(causal.parameters())
    size = int(causal.config.get_text_config(decoder=True).hidden_size)
    head = nn.Linear(size, vocab, bias=False, device=weight.device)
    nn.init.zeros_(head.weight)
    return Headed(trunk, head.to(weight.dtype))


def fit(
    head: Headed,
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    labels: Sequence[float] | Tensor,
    weights: Tensor | None = None,
    *,
    consistency: float = 1.0,
    reverse: bool = False,
    head_only: bool = False,
    epochs: int = 5,
    batch: int = 16,
    learning_rate: float = 1e-5,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train a head on completions (ids) of the frozen `model` and the oracle's `labels` [N] in [0, 1], by `nado/loss`.

    `weights` [N] is the model's probability of each completion over that of the law it was drawn from, if that was
    another; rare agreement is so made frequent. Dropout stays off. An `Aux` on the head must be reset afterwards.

    Raises:
        ValueError: for labels outside [0, 1], an empty prompt or completion, or different numbers of them.
    """
    targets = torch.as_tensor(labels, dtype=torch.float32)
    texts = texts_of("nado", prompts, completions)
    if targets.shape != (len(texts),) or bool(((targets < 0) | (targets > 1)).any()):
        raise ValueError(f"nado needs one label in [0, 1] for each of {len(texts)} completions")
    parameters = list((head.head if head_only else head).parameters())
    device = parameters[0].device
    causal = base_model(model)

    def loss(rows: list[int]) -> Tensor:
        ids, mask = padded([texts[i] for i in rows], device)
        odds = head(input_ids=ids, attention_mask=mask.long()).logits.float()
        with torch.no_grad():
            base = causal(input_ids=ids, attention_mask=mask.long()).logits.float().log_softmax(-1)
        at, tokens, inside = response_places([len(prompts[i]) for i in rows], ids, mask)
        chosen = at[..., None].expand(*at.shape, odds.shape[-1])
        base = base[..., : odds.shape[-1]].gather(1, chosen)
        return nado_loss(
            odds.gather(1, chosen),
            base,
            tokens,
            targets[rows].to(device),
            inside,
            None if weights is None else weights[rows].to(device),
            consistency=consistency,
            reverse=reverse,
        )

    with evaluating(head), evaluating(causal):
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


def texts_of(method: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts and completions (ids) as whole texts.

    Raises:
        ValueError: for an empty one, or different numbers of them.
    """
    if len(prompts) != len(completions) or not all(map(len, prompts)) or not all(map(len, completions)):
        raise ValueError(f"{method} trains on completions and their prompts, as many of both, none of them empty")
    return [[*p, *c] for p, c in zip(prompts, completions, strict=True)]


def response_places(lengths: Sequence[int], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where completions behind prompts of `lengths` are predicted in `ids` [B, S], their tokens, and which are real.

    All [B, T], T the longest completion. Places that are not real point at the last column.
    """
    starts = torch.tensor(lengths, device=ids.device)[:, None]
    width = int((mask.sum(1) - starts[:, 0]).max())
    columns = starts + torch.arange(width, device=ids.device)
    inside = columns < mask.sum(1)[:, None]
    columns = columns.clamp(max=ids.shape[1] - 1)
    return columns - 1, ids.gather(1, columns), inside
