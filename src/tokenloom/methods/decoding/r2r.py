"""R2R: a small model writes, a large one is asked where a router sees the paths part (arXiv 2505.21600).

At each position the small model proposes token s. The router reads its last hidden state h [D], its K = 100 largest
logits, sorted, and the embedding of s; where sigmoid(router) >= p_th the large model's token stands instead.
Router: x = W [h, E_s, P logits] -> d -> d; six blocks x + drop(W2 drop(gelu(W1 LN(x)))), W1 four times as wide;
LN, linear to one score. Trained by cross-entropy, right rows weighted by (negatives / positives) recall_factor.

Shapes: hidden [B, D], logits [B, K], tokens [B] ids, scores [B]. Entropies in nats, of the small model's raw logits.
Limits: p_th > 1 is the small model alone, p_th <= 0 the large one alone. Average active parameters are
small + usage large. `r2r/entropy` is a router that needs no training; `methods.decoding.r2r_windows` has others.
Deviations: none. Fidelity: code (network).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tokenloom.catalog import part

PAPER = "arXiv:2505.21600"
TOP = 100
"""Largest logits that a router reads."""


class Router(nn.Module):
    """Scores [B] of positions; above 0 more likely than not that the small model's token leads elsewhere."""

    def __init__(self, embeddings: Tensor, *, top: int = TOP, width: int = 1024, blocks: int = 6, dropout: float = 0.1):
        """`embeddings` [V, D]: the small model's input embeddings; they are kept as they are."""
        super().__init__()
        size = embeddings.shape[1]
        self.shape = {"top": top, "width": width, "blocks": blocks}
        self.embeddings = nn.Embedding(len(embeddings), size, _weight=embeddings.detach().float().clone(), _freeze=True)
        self.logits = nn.Linear(top, size)
        self.combine = nn.Linear(3 * size, width)
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, hidden: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """Scores [B] from hidden states [B, D], the largest logits in falling order [B, K] and tokens [B]."""
        seen = torch.cat((hidden.float(), self.embeddings(tokens), self.logits(logits.float())), -1)
        x = self.enter(self.combine(seen))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.leave(x))[:, 0]


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.mlp(self.norm(x)))


@part("r2r", stage="choose", scope="row", paper=PAPER)
def route(scores: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Which rows [B] the large model takes, by router scores [B]."""
    return torch.sigmoid(scores) >= threshold


@part("r2r/entropy", stage="choose", scope="row", paper=PAPER)
def route_by_entropy(scores: Tensor, *, threshold: float = 0.45) -> Tensor:
    """Which rows [B] the large model takes: where the small one's law, softmax of `scores` [B, V], is uncertain."""
    entropies: Tensor = torch.special.entr(scores.softmax(-1)).sum(-1)
    return entropies > threshold


@part("r2r/loss", stage="objective", scope="batch", paper=PAPER)
def router_loss(scores: Tensor, labels: Tensor, *, positive_weight: float = 1.0) -> Tensor:
    """Mean cross-entropy, a scalar, of scores [B] for labels [B] in {0, 1}; positives count `positive_weight` times."""
    weight = torch.as_tensor(positive_weight, dtype=scores.dtype, device=scores.device)
    return nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), pos_weight=weight)


@part("r2r/positive-weight", stage="analysis", scope="batch", paper=PAPER)
def positive_weight(labels: Tensor, *, recall_factor: float = 1.0) -> float:
    """(negatives / positives) recall_factor of labels [N]; 1 where one side is missing."""
    positives = int((labels > 0.5).sum())
    negatives = labels.numel() - positives
    return recall_factor * negatives / positives if positives and negatives else 1.0


@part("r2r/threshold", stage="analysis", scope="batch", paper=PAPER)
def recall_threshold(scores: Tensor, labels: Tensor, *, recall: float = 0.95) -> float:
    """The largest threshold on sigmoid(scores) [N] that still routes `recall` of the positive labels [N].

    Raises:
        ValueError: without positives, or for a recall outside (0, 1].
    """
    positive = torch.sigmoid(scores[labels > 0.5]).sort(descending=True).values
    if not len(positive) or not 0 < recall <= 1:
        raise ValueError("r2r: a threshold by recall needs positive labels and 0 < recall <= 1")
    # Rounding of recall x count must not ask for one more than it means.
    wanted = max(int(-(-(recall * len(positive) - 1e-9) // 1)), 1)
    return float(positive[wanted - 1])


@part("r2r/usage-threshold", stage="analysis", scope="batch", paper=PAPER)
def usage_threshold(scores: Tensor, *, usage: float = 0.1) -> float:
    """The smallest threshold on sigmoid(scores) [N] that routes at most the share `usage` of them."""
    ranked = torch.sigmoid(scores).sort(descending=True).values
    most = int(usage * len(ranked) + 1e-9)
    if most >= len(ranked):
        return 0.0
    # Just above the first that stays: with equal scores fewer are routed, never more.
    return float(torch.nextafter(ranked[most], torch.full_like(ranked[most], torch.inf)))


@part("r2r/active-parameters", stage="analysis", scope="batch", paper=PAPER)
def active_parameters(small: float, large: float, usage: float) -> float:
    """Average parameters that a token activates when the large model writes the share `usage` of them."""
    return small + usage * large
