"""RAD: add the reward of each of the k best tokens to its score (arXiv 2310.09520).

scores'_v = scores_v + beta * clamp(r_v, 0, 1) for the k best v (1 - r with `inverse`), -inf for all others
r_v is what a unidirectional reward model says of the text with v appended, read at its last token.
Training of that model on texts of l tokens with label y, every token a prediction, later ones weighing more:
loss = mean over texts of 2 / (l (l + 1)) * sum_{t=1..l} t (r_t - y)^2

B rows, V vocabulary, T tokens. Among equal scores the lowest ids are the best. Limits: beta = 0 or equal rewards are
top-k sampling, k = 1 is greedy. Deviations: none. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.selection import keep_largest, largest


@part("rad", stage="shape", scope="row", paper="arXiv:2310.09520")
def reward_augmented(
    scores: Tensor, candidates: Tensor, rewards: Tensor, *, beta: float = 30.0, inverse: bool = False
) -> Tensor:
    """Scores [B, V] from `scores` [B, V] and `rewards` [B, k] of `candidates` [B, k], ids that differ in a row."""
    bounded = rewards.to(scores.dtype).clamp(0, 1)
    raised = scores.gather(1, candidates) + beta * (1 - bounded if inverse else bounded)
    return torch.full_like(scores, -torch.inf).scatter(1, candidates, raised)


def best_tokens(scores: Tensor, k: int) -> Tensor:
    """The ids [B, min(k, V)] of the best tokens of `scores` [B, V], ascending; of equal scores the lowest ids.

    Raises:
        ValueError: for k < 1.
    """
    if k < 1:
        raise ValueError(f"rad needs k >= 1, got {k}")
    vocab = scores.shape[1]
    k = min(k, vocab)
    count = torch.full((len(scores), 1), k, device=scores.device)
    keep = keep_largest(scores, largest(scores, min(k + 1, vocab)), count)
    return keep.nonzero()[:, 1].view(-1, k)


@part("rad/loss", stage="objective", scope="batch", paper="arXiv:2310.09520")
def cumulative_mse(rewards: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The loss of `rewards` [B, T] for `labels` [B] in [0, 1]; `mask` [B, T] bool, True on the tokens of the text.

    Raises:
        ValueError: when a row has no token.
    """
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("rad's reward model needs at least one token in every text")
    error = torch.where(mask, rewards - labels.to(rewards.dtype)[:, None], 0.0).square()
    weighted = (mask.cumsum(1) * error).sum(1)
    return (2 * weighted / (lengths * (lengths + 1))).mean()
