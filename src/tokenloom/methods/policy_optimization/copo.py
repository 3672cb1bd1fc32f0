"""COPO: blend the local group advantage with a global one from answer consistency (COPO, 2025).

Per prompt g of G rows: q the frequencies of its answers, H_g = -sum q log2 q (bits), lambda_G = (1 - 1/G) / log2 G
global reward     R_g = mean_g(R) (1 - lambda_G H_g)
global advantage  (R_g - mean over prompts) / (std over prompts + eps), the same for all rows and tokens  [B, T]
share of local    w_g = sigmoid(k (H_g - b)), and 0 where the local advantage is 0 ("forced")             [B]
objective = w J(A_local) + (1 - w) J(A_global), J the same dual-clip surrogate. So a degenerate group, on which GRPO
learns nothing, still learns by how consistent it is compared with the other prompts.
Bessel's correction over prompts; one prompt in the batch has no std, so its global advantage is 0; G = 1 has
lambda = 0. Answers are compared after stripping and lower-casing; rows without an answer (None) count as distinct
answers, which raises the entropy: silence is not agreement (our choice, the source leaves it open). Unscorable rows
are left out of the means. Limit: w = 1 is GRPO. Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_mean, group_size, to_tokens

PAPER = "COPO (2025)"

Mode = Literal["soft-forced", "soft", "forced", "global", "nonzero", "soft-nonzero"]


def answer_entropy(answers: tuple[Any, ...], group_ids: Tensor) -> Tensor:
    """Entropy in bits of the answers of each row's group, [B] float64."""
    counts: dict[tuple[int, Any], int] = {}
    sizes: dict[int, int] = {}
    keys = [(g, _canonical(a, i)) for i, (g, a) in enumerate(zip(group_ids.tolist(), answers, strict=True))]
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
        sizes[key[0]] = sizes.get(key[0], 0) + 1
    bits = dict.fromkeys(sizes, 0.0)
    for (group, _), count in counts.items():
        q = torch.tensor(count / sizes[group], dtype=torch.float64)
        bits[group] -= float(q * q.log2())
    return torch.tensor([bits[g] for g in group_ids.tolist()], dtype=torch.float64, device=group_ids.device).abs()


@part("copo/global", stage="advantage", scope="batch", paper=PAPER)
def global_advantage(
    rewards: Tensor, answers: tuple[Any, ...], group_ids: Tensor, mask: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Advantages [B, T] of each row's prompt against the other prompts of the batch."""
    scored = ~rewards.isnan()
    value = global_reward(rewards, answers, group_ids)
    first = torch.stack([(group_ids == g).nonzero()[0, 0] for g in torch.unique(group_ids)]) if len(rewards) else None
    advantages = torch.zeros_like(rewards)
    if first is not None and len(first) > 1:
        prompts = value[first]
        centered = value - prompts.mean()
        constant = bool((prompts == prompts[0]).all())
        advantages = torch.zeros_like(value) if constant else centered / (prompts.std() + eps)
    return to_tokens(torch.where(scored, advantages, torch.zeros_like(advantages)), mask)


def global_reward(rewards: Tensor, answers: tuple[Any, ...], group_ids: Tensor) -> Tensor:
    """R_g of each row's prompt, [B]: the mean reward, reduced by how much the answers disagree."""
    scored = ~rewards.isnan()
    size = group_size(group_ids).to(rewards.dtype)
    entropy = answer_entropy(answers, group_ids).to(rewards.dtype)
    scale = (1 - 1 / size) / size.log2().clamp(min=1.0)
    return group_mean(rewards, group_ids, scored).nan_to_num() * (1 - scale * entropy)


@part("copo/share", stage="blend", scope="group", paper=PAPER)
def local_share(
    advantages: Tensor, outcomes: Tensor, answers: tuple[Any, ...], group_ids: Tensor,
    *, k: float = 1.0, b: float = 0.5, mode: Mode = "soft-forced",
) -> Tensor:  # fmt: skip
    """The local branch's share [B]. "forced": 0 where the local advantage is 0; "nonzero": 0 where the outcome is."""
    soft = torch.sigmoid(k * (answer_entropy(answers, group_ids).to(advantages.dtype) - b))
    one, zero = torch.ones_like(soft), torch.zeros_like(soft)
    base = {"soft": soft, "soft-forced": soft, "soft-nonzero": soft, "global": zero}.get(mode, one)
    if mode in ("soft-forced", "forced"):
        return torch.where(advantages.ne(0).any(-1), base, zero)
    if mode in ("nonzero", "soft-nonzero"):
        return torch.where(outcomes.nan_to_num().ne(0), base, zero)
    return base


def _canonical(answer: Any, row: int) -> Any:
    # A row without an answer agrees with nobody.
    return ("none", row) if answer is None else str(answer).strip().lower()


@preset("copo", paper=PAPER)
def copo_preset(*, k: float = 1.0, b: float = 0.5, mode: Mode = "soft-forced") -> Algorithm:
    """GRPO's local advantage and the global one through one dual clip (cap 3), token mean."""
    return Algorithm.compose(
        advantage="grpo",
        surrogate="dual-clip",
        bounds={"part": "clip", "low": 0.2, "high": 0.2, "cap": 3.0},
        aggregate="token-mean",
        blend={"part": "copo/share", "k": k, "b": b, "mode": mode, "advantage": "copo/global"},
    )
