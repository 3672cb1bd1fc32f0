"""SPINE: test-time training without labels, on forking tokens only, inside a band of entropy (arXiv 2511.17938).

Vote: the pseudo-label of a prompt is the answer that most of its responses give (ties: the first seen), and the
reward is 1 for it and 0 for others (TTRL).                                                                  [B]
Forking tokens: the ceil(rho len) tokens of each response with the highest entropy; only they are trained on, and
only they count in the normalizer.                                                                        [B, T]
Band: with L, U the q_lo- and q_hi-quantiles of the entropies H (nats) of a row's forking tokens, detached,
loss_t = max(0, L - H_t)^2 + max(0, H_t - U)^2, averaged over forking tokens: it lifts H below L and presses it
down above U.                                                                                             [B, T]
A response without a parsed answer has no vote and earns 0; one without a score (NaN) neither votes nor counts.
`skip_single` leaves a prompt out whose answers all differ, where the vote is arbitrary. What the
verifier said of right and wrong is not read. Limits: rho = 1 and band_coef = 0 are TTRL on GRPO.
Deviations: written from the abstract and summaries: quantiles by response and not by batch (so that any micro-batch
split gives the same gradient), quantile levels and coefficient are ours. Fidelity: reconstructed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.top_tokens import counted_up, top_by_row

_PAPER = "arXiv:2511.17938"


@part("spine/vote", stage="reward", scope="group", paper=_PAPER, properties={"order-dependent"})
def vote(rewards: Tensor, answers: tuple[Any, ...], group_ids: Tensor, *, skip_single: bool = False) -> Tensor:
    """Rewards [B]: 1 for the group's most frequent answer, 0 for others; NaN stays NaN, as do skipped groups.

    >>> vote(torch.zeros(3), ("a", "a", "b"), torch.zeros(3, dtype=torch.int64))
    tensor([1., 1., 0.])
    """
    out = torch.where(rewards.isnan(), rewards, torch.zeros_like(rewards))
    for group in torch.unique(group_ids):
        rows = ((group_ids == group) & ~rewards.isnan()).nonzero().reshape(-1).tolist()
        votes = [answers[i] for i in rows if answers[i] is not None]
        counts = [votes.count(v) for v in votes]
        if not votes:
            continue
        winner = votes[counts.index(max(counts))]
        for i in rows:
            # An answer may be any JSON value, so equality decides and not a hash.
            out[i] = float(answers[i] is not None and answers[i] == winner)
            if skip_single and max(counts) == 1:
                out[i] = float("nan")
    return out


@part("spine/forking", stage="weight", scope="row", paper=_PAPER)
def forking(entropies: Tensor, mask: Tensor, *, rho: float = 0.2) -> Tensor:
    """Weights [B, T]: 1 on the share `rho` of each row's tokens with the highest entropy, at least one, else 0.

    Raises:
        ValueError: for rho outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho is the fraction of tokens that are trained on, in (0, 1]; got {rho}")
    return top_by_row(entropies, mask, counted_up(rho, mask)).to(entropies.dtype)


@part("spine/band", stage="term", scope="row", paper=_PAPER)
def band(entropies: Tensor, weights: Tensor, mask: Tensor, *, q_lo: float = 0.1, q_hi: float = 0.9) -> Tensor:
    """Squared distance [B, T] of the entropies to the band, a loss with gradient; zero off the forking tokens.

    A row's band is taken from its tokens with a positive policy weight, which are the forking ones.

    Raises:
        ValueError: unless 0 <= q_lo <= q_hi <= 1.
    """
    if not 0 <= q_lo <= q_hi <= 1:
        raise ValueError(f"the band needs 0 <= q_lo <= q_hi <= 1, got q_lo={q_lo}, q_hi={q_hi}")
    fork = mask & (where_mask(weights, mask) > 0)
    h = where_mask(entropies, fork)
    low, high = (row_quantile(h.detach(), fork, q) for q in (q_lo, q_hi))
    return where_mask(outside_band(h, low, high), fork)


def outside_band(entropies: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """max(0, low - H)^2 + max(0, H - high)^2 in squared nats [B, T]; the limits broadcast."""
    return (low - entropies).clamp(min=0) ** 2 + (entropies - high).clamp(min=0) ** 2


def row_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linearly interpolated `q`-quantile of each row over the mask, [B, 1]; 0 where nothing is selected."""
    if not mask.shape[1]:
        return x.new_zeros(len(x), 1)
    ordered = where_mask(x, mask, float("inf")).sort(-1).values
    place = q * (mask.sum(-1, keepdim=True) - 1).clamp(min=0).to(x.dtype)
    low, high = (ordered.gather(-1, p.long()) for p in (place.floor(), place.ceil()))
    return where_mask(torch.lerp(low, high, place - place.floor()), mask.any(-1, keepdim=True))


@preset("spine", paper=_PAPER)
def spine_preset(
    *,
    rho: float = 0.2,
    band_coef: float = 0.01,
    q_lo: float = 0.1,
    q_hi: float = 0.9,
    skip_single: bool = False,
    kl_coef: float = 0.0,
) -> Algorithm:
    """Majority vote as reward, GRPO on forking tokens, entropy band; k3 KL to the reference if asked."""
    fork: dict[str, Any] = {"part": "spine/forking", "rho": rho}
    over = {"part": "token-mean", "count": "weights"}
    regularizer = {"part": "spine/band", "coef": band_coef, "q_lo": q_lo, "q_hi": q_hi}
    terms = [regularizer | {"weight": [fork], "aggregate": over}] if band_coef else []
    return Algorithm.compose(
        reward=[{"part": "spine/vote", "skip_single": skip_single}],
        advantage="grpo",
        weight=[fork],
        surrogate="ppo-clip",
        aggregate=over,
        terms=terms + ([{"part": "kl", "coef": kl_coef, "aggregate": "token-mean"}] if kl_coef else []),
    )
