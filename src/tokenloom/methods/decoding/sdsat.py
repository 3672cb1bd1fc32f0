"""SDSAT: adaptive tokens behind a text predict its next tokens, all in one pass (arXiv 2403.18647).

k further tokens <a_1> ... <a_k> stand behind token y_t at positions t + 1 ... t + k; <a_j> is trained to predict
y_(t+1+j). Ordinary tokens do not see them, so what ordinary tokens predict is unchanged. One block sees the text up
to its y_t and itself. Loss: cross-entropy of ordinary tokens plus that of adaptive ones.
Decoding: a pass over text and block gives the next token (exactly) and k drafts of the tokens behind it; the next pass
verifies the drafts and, with blocks behind them, makes the next drafts.

Deviations: blocks lie behind the whole row instead of behind their token; mask and positions say where they stand, so
this is the same function. Positions of blocks are drawn evenly. Fidelity: paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2403.18647"
IGNORED = -100


class Inserted(NamedTuple):
    """A row with blocks: S = T + n k tokens."""

    ids: Tensor
    """[S] int64: the T ordinary tokens, then the blocks."""
    positions: Tensor
    """[S] int64."""
    visible: Tensor
    """[S, S] bool: what each token (first axis) sees."""
    labels: Tensor
    """[S] int64: what each is to predict, already shifted; `IGNORED` where the row has no such token."""


@part("sdsat/insert", stage="objective", scope="row", paper=PAPER)
def insert(ids: Tensor, after: Sequence[int], adaptive: Sequence[int]) -> Inserted:
    """The row `ids` [T] with a block of `adaptive` tokens behind each of the places `after`, in 0 ... T - 1.

    Raises:
        ValueError: for a place outside the row, or no adaptive tokens.
    """
    t, k, n = len(ids), len(adaptive), len(after)
    if k == 0 or any(not 0 <= place < t for place in after):
        raise ValueError(f"needs adaptive tokens, and places in 0 ... {t - 1}; got {list(adaptive)} and {list(after)}")
    places = torch.tensor(list(after), dtype=torch.int64)
    steps = torch.arange(1, k + 1)
    positions = torch.cat((torch.arange(t), (places[:, None] + steps).flatten()))
    blocks = torch.tensor(list(adaptive), dtype=torch.int64).repeat(n)
    followers = torch.cat((ids.cpu(), torch.full((k + 1,), IGNORED)))
    labels = torch.cat((followers[1 : t + 1], followers[(places[:, None] + 1 + steps).clamp(max=t)].flatten()))
    visible = torch.zeros(t + n * k, t + n * k, dtype=torch.bool)
    visible[:t, :t] = torch.ones(t, t, dtype=torch.bool).tril()
    visible[t:, :t] = (torch.arange(t) <= places[:, None]).repeat_interleave(k, 0)
    of = torch.arange(n).repeat_interleave(k)
    visible[t:, t:] = (of[:, None] == of) & torch.ones(n * k, n * k, dtype=torch.bool).tril()
    return Inserted(torch.cat((ids.cpu(), blocks)), positions, visible, labels)


@part("sdsat/loss", stage="objective", scope="batch", paper=PAPER)
def loss(logits: Tensor, labels: Tensor, adaptive: Tensor, *, weight: float = 1.0) -> Tensor:
    """Mean cross-entropy of ordinary tokens plus `weight` times that of adaptive ones, in nats.

    Args:
        logits: [B, S, V].
        labels: [B, S], already shifted, `IGNORED` where nothing is to predict.
        adaptive: [B, S] bool, which are adaptive tokens.

    Raises:
        ValueError: for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight is what the loss of adaptive tokens is multiplied by, 0 or more; got {weight}")
    each = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    parts = []
    for chosen in (~adaptive, adaptive):
        counted = chosen & (labels != IGNORED)
        parts.append((each * counted).sum() / counted.sum().clamp(min=1))
    return parts[0] + weight * parts[1]


@part("sdsat", stage="draft", scope="row", paper=PAPER)
def sdsat(scores: Tensor, *, drafts: int = 5) -> list[int]:
    """The drafts behind the next token: the most probable token after each of the first `drafts` adaptive ones.

    `scores` [k, V] are those of the block behind the last accepted token.
    """
    return [int(token) for token in scores[:drafts].argmax(-1)]
