"""THR: token hidden reward, how much training on a token moves the right responses (arXiv 2510.03669).

Per group, with h the state that predicts a token, g = e_y - pi restricted to the tokens that occur in the group (V*,
not renormalized), P the right rows (outcome above 1/2):
s_{j,k'} = sum_{i in P} 1/len_i sum_k <g_{i,k}, g_{j,k'}> <h_{i,k}, h_{j,k'}> = g^T M h,  M = sum_P 1/len_i G_i^T H_i
THR = s for right rows, -s for wrong ones                                                      [B, T]
tau = beta min_{i in P} mean_k s_{i,k}, taken as 0 when negative, so that the mask means something
A' = [|THR| > tau] (1 + sign(THR) p) A: p > 0 exploits (greedy accuracy), p < 0 explores (pass@k)
NTHR (`thr/negative`), the parent method: only wrong-row tokens with s > tau, M without 1/len, have their advantage
scaled by eta = 2 |1/2 - |P| / G|. A group without right or without wrong rows is left as it is.
Limit: p = 0 and threshold "none" is GRPO. Deviations: tau from the parent method. Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_extreme, group_mean, masked_mean, where_mask
from tokenloom.signals import group_signal

PAPER = "arXiv:2510.03669"
RIGHT = 0.5
CHUNK = 128
"""Tokens whose logits exist at once."""


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, 2, generator=generator, dtype=torch.float64) + 0.3


@group_signal("hidden_influence", "hidden", "logits", "tokens", "mask", "outcomes", example=_example)
def hidden_influence(
    hidden: Tensor, logits: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor, outcomes: Tensor
) -> Tensor:
    """[R, T, 2]: s with right rows averaged over their tokens (THR) and summed (NTHR)."""
    out = torch.zeros(*mask.shape, 2, dtype=hidden.dtype, device=hidden.device)
    if not bool(mask.any()):
        return out
    states, ids = hidden[mask], tokens[mask]
    vocabulary = torch.unique(ids)
    chunks = zip(torch.split(states, CHUNK), torch.split(ids, CHUNK), strict=True)
    errors = torch.cat([_errors(logits(h), y, vocabulary) for h, y in chunks]).to(hidden.dtype)
    right = (outcomes > RIGHT)[:, None].expand(mask.shape)[mask].to(errors.dtype)
    length = mask.sum(-1, keepdim=True).expand(mask.shape)[mask]
    for i, weight in enumerate((right / length, right)):
        influence = errors.T @ (weight[:, None] * states)  # [|V*|, D]
        out[..., i][mask] = ((errors @ influence) * states).sum(-1)
    return out


def _errors(logits: Tensor, tokens: Tensor, vocabulary: Tensor) -> Tensor:
    law = torch.softmax(logits, -1)[:, vocabulary]
    return (tokens[:, None] == vocabulary).to(law.dtype) - law


@part("thr", stage="credit", scope="group", paper=PAPER)
def token_hidden_reward(
    advantages: Tensor, hidden_influence: Tensor, outcomes: Tensor, group_ids: Tensor, mask: Tensor,
    *, p: float = 0.1, beta: float = 1.0, threshold: Literal["influence", "none"] = "influence",
) -> Tensor:  # fmt: skip
    """Advantages [B, T] of the dominant tokens, reinforced by p with the sign of their influence; others 0."""
    score = where_mask(hidden_influence[..., 0].detach(), mask).to(advantages.dtype)
    right, mixed = _sides(outcomes, group_ids, mask)
    signed = torch.where(right[:, None], score, -score)
    chosen = mask
    if threshold == "influence":
        chosen = mask & (signed.abs() > _threshold(score, right, group_ids, mask, beta)[:, None])
    changed = where_mask((1 + p * signed.sign()) * advantages, chosen)
    return torch.where(mixed[:, None], changed, where_mask(advantages, mask))


@part("thr/negative", stage="credit", scope="group", paper=PAPER)
def negative_hidden_reward(
    advantages: Tensor, hidden_influence: Tensor, outcomes: Tensor, group_ids: Tensor, mask: Tensor,
    *, beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Advantages [B, T], those of wrong-row tokens that resemble right responses scaled by 2 |1/2 - share right|."""
    score = where_mask(hidden_influence[..., 1].detach(), mask).to(advantages.dtype)
    right, mixed = _sides(outcomes, group_ids, mask)
    share = group_mean(right.to(advantages.dtype), group_ids, _scored(outcomes, mask))
    limit = _threshold(score, right, group_ids, mask, beta)
    hit = mask & (mixed & ~right)[:, None] & (score > limit[:, None])
    return where_mask(torch.where(hit, 2 * (0.5 - share).abs()[:, None] * advantages, advantages), mask)


def _scored(outcomes: Tensor, mask: Tensor) -> Tensor:
    return ~outcomes.isnan() & mask.any(-1)


def _sides(outcomes: Tensor, group_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are right, and which belong to a group that has both kinds: [B] bool."""
    scored = _scored(outcomes, mask)
    right = scored & (outcomes > RIGHT)
    share = group_mean(right.double(), group_ids, scored)
    return right, (share > 0) & (share < 1)


def _threshold(score: Tensor, right: Tensor, group_ids: Tensor, mask: Tensor, beta: float) -> Tensor:
    """tau of each row's group, [B]."""
    lowest = group_extreme(masked_mean(score, mask, -1), group_ids, right, largest=False)
    return (beta * torch.where(lowest.isfinite(), lowest, torch.zeros_like(lowest))).clamp(min=0)


@preset("thr", paper=PAPER)
def thr_preset(*, p: float = 0.1, variant: Literal["thr", "negative"] = "thr") -> Algorithm:
    """GRPO with dynamic sampling, clip 0.2 and a KL of 1e-4; "negative" is NTHR, which has no p."""
    credit = {"part": "thr", "p": p} if variant == "thr" else {"part": "thr/negative"}
    return Algorithm.compose(
        advantage="grpo",
        select=["dapo/dynamic-sampling"],
        credit=[credit],
        surrogate="ppo-clip",
        aggregate="sequence-mean",
        terms=[{"part": "kl", "coef": 1e-4, "estimator": "k3"}],
    )
