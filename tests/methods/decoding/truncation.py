"""What the tests of truncation rules share: the sheet's law, random scores, and the comparison with transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

P = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], dtype=torch.float64)
"""H = 1.333074 nats."""


def kept(keep: Tensor) -> list[int]:
    """Ids that the only row keeps."""
    assert len(keep) == 1
    return keep[0].nonzero().flatten().tolist()


def random_scores(rows: int = 64, vocab: int = 200, seed: int = 0) -> Tensor:
    """Rows from nearly flat to nearly certain, some tokens impossible, float64."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=g, dtype=torch.float64) * torch.linspace(0.1, 8, rows)[:, None]
    scores[::5, 150:] = -torch.inf
    return scores


def agree(rule: Callable[[Tensor], Tensor], warper: Any, scores: Tensor | None = None) -> None:
    """The rule keeps what a processor of transformers leaves possible."""
    scores = random_scores() if scores is None else scores
    theirs = warper(torch.zeros(len(scores), 1, dtype=torch.int64), scores.clone()) > -torch.inf
    assert torch.equal(rule(scores.softmax(-1)), theirs)
