"""Rectification: no token may be more probable than a text behind it is safe (arXiv 2302.14003).

Q(s, a) in [-1, 0]: minus the probability that the finished text is undesired once a is chosen.
cap = clamp(1 + Q(s, .) - epsilon, 1e-7, 1); a round is z = min(z, log cap + logsumexp(z)), two of them, then softmax.
Training (SARSA): reward -1 at the end of an undesired text, else 0; target gamma * Q'(s_t+1, a_t+1) from a slowly
following copy Q', at the last token the reward, clamped to [-1, 0]; squared error over the number of tokens.

B rows, V vocabulary, T tokens. After finitely many rounds the law is near, not under, its caps; many rounds converge to
min(cap, c p), which stays under them wherever the caps of the possible tokens sum to 1 at least (`feasible`); elsewhere
softmax breaks them. Limit: Q = 0, epsilon = 0 changes nothing. Deviations: the paper has one round of renormalization,
the release's latest script three; two are its earlier ones. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part

_LEAST = 1e-7


@part("rectification", stage="shape", scope="row", paper="arXiv:2302.14003")
def rectify(scores: Tensor, values: Tensor, *, epsilon: float = 0.1, rounds: int = 2) -> Tensor:
    """Scores [B, V] from `scores` [B, V] under the caps of `values` Q [B, V].

    Raises:
        ValueError: unless rounds >= 1 and 0 <= epsilon <= 1.
    """
    if rounds < 1 or not 0 <= epsilon <= 1:
        raise ValueError(f"rectification needs rounds >= 1 and epsilon in [0, 1], got {rounds} and {epsilon}")
    cap = caps(values, epsilon).log().to(scores.dtype)
    for _ in range(rounds):
        lowered = torch.minimum(scores, cap + scores.logsumexp(-1, keepdim=True))
        if torch.equal(lowered, scores):
            break
        scores = lowered
    return scores


def caps(values: Tensor, epsilon: float) -> Tensor:
    """The most probability [B, V] that each token may have."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return (1 + wide.clamp(-1, 0) - epsilon).clamp(_LEAST, 1)


@part("rectification/feasible", stage="analysis", scope="row", paper="arXiv:2302.14003")
def feasible(scores: Tensor, values: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """Whether some law on the possible tokens of `scores` [B, V] stays under the caps, [B]; if not, s is a dead end."""
    possible = scores > -torch.inf
    return (caps(values, epsilon).double() * possible).sum(-1) >= 1 - 1e-9


@part("rectification/loss", stage="objective", scope="batch", paper="arXiv:2302.14003")
def sarsa_loss(values: Tensor, following: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The loss of `values` Q(s_t, a_t) [B, T]; `following` [B, T] are the copy's Q' of the same tokens.

    `rewards` [B]: -1 for an undesired text, else 0. `mask` [B, T], True on tokens, without holes.

    Raises:
        ValueError: when a row has no token.
    """
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("rectification's values need at least one token in every text")
    behind = gamma * torch.cat((following[:, 1:], following[:, -1:]), 1)
    last = torch.arange(values.shape[1], device=values.device) >= (lengths - 1)[:, None]
    targets = torch.where(last, rewards.to(values.dtype)[:, None], behind).clamp(-1, 0).detach()
    return torch.where(mask, values - targets, 0.0).square().sum() / lengths.sum()
