"""Two stages of RLVR: exploiting what is likely first, discovering what is better late (analysis, no preset).

Softmax bandit with logits z, p = softmax(z), arm values R; one exact step is
z += rate p (a - sum p a),  a = R - sum p R
or, sampled, the mean over G draws of their normalized advantages times (e_i - p). Starting from a favorite of middling
value, a rare best arm first *loses* mass to the favorite (exploitation, coverage shrinks) and overtakes much later
(exploration, coverage grows). Updating on negative advantages only, A' = min(A, 0), keeps mass on what was not tried.
On a batch, `rlvr-two-stage` measures coverage: pass@k, and how likely a group is to miss every right response.
pass@k = 1 - C(n - c, k) / C(n, k) for c right of n is unbiased; miss = (1 - c / n)^n. The simulator is ours, the
source gives none. Fidelity: reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import where_mask

PAPER = "RLVR two-stage dynamics (2025)"
RIGHT = 0.5

Mode = Literal["both", "negative-only", "positive-only"]


@dataclass(frozen=True)
class Flow:
    """`probabilities` [steps + 1, K] after each step; the first step at which the best arm leads, or None."""

    probabilities: Tensor
    overtakes: int | None


def bandit_flow(
    start: Tensor, values: Tensor, *, rate: float = 1.0, steps: int = 1000, group: int | None = None,
    mode: Mode = "both", generator: torch.Generator | None = None,
) -> Flow:  # fmt: skip
    """Train a softmax bandit from probabilities `start` [K] with arm `values` [K], exactly or with `group` samples.

    Sampled rewards are 1 with probability R (values in [0, 1]); advantages are GRPO's over the group.

    Raises:
        ValueError: for a start that is no distribution, or sampling with values outside [0, 1].
    """
    p = start.double()
    if not bool((p > 0).all()) or abs(float(p.sum()) - 1) > 1e-6:
        raise ValueError(f"start must be positive and sum to 1, got {start.tolist()}")
    value = values.double()
    if group is not None and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError("with sampling, values are the chance of a reward of 1 and must lie in [0, 1]")
    logits, best = p.log(), int(value.argmax())
    curve = [p]
    for _ in range(steps):
        if group is None:
            a = _masked(value - (p * value).sum(), mode)
            logits = logits + rate * p * (a - (p * a).sum())
        else:
            arms = torch.multinomial(p, group, replacement=True, generator=generator)
            reward = (torch.rand(group, generator=generator, dtype=p.dtype) < value[arms]).double()
            spread = reward.std() if group > 1 else reward.new_zeros(())
            a = _masked((reward - reward.mean()) / (spread + 1e-6), mode)
            pull = torch.zeros_like(p).index_add_(0, arms, a) - a.sum() * p
            logits = logits + rate * pull / group
        p = logits.softmax(-1)
        curve.append(p)
    law = torch.stack(curve)
    leads = (law.argmax(-1) == best).nonzero()
    return Flow(law, int(leads[0]) if len(leads) else None)


def _masked(advantages: Tensor, mode: Mode) -> Tensor:
    limits = {"both": (None, None), "negative-only": (None, 0.0), "positive-only": (0.0, None)}
    low, high = limits[mode]
    return advantages if low is None and high is None else advantages.clamp(low, high)


@part("rlvr-two-stage/negative-only", stage="credit", scope="token", paper=PAPER)
def negative_only(advantages: Tensor, mask: Tensor) -> Tensor:
    """min(A, 0) [B, T]: wrong responses are pushed down, nothing is pushed up by name."""
    return where_mask(advantages, mask).clamp(max=0)


def pass_at_k(right: int, total: int, k: int) -> float:
    """Unbiased chance that at least one of k of the responses is right.

    Raises:
        ValueError: when k is not in 1..total.

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    if not 1 <= k <= total:
        raise ValueError(f"k must lie in 1..{total}, the number of responses; got {k}")
    miss = 1.0
    for i in range(k):
        miss *= max(total - right - i, 0) / (total - i)
    return 1 - miss


@part("rlvr-two-stage", stage="metric", scope="batch", paper=PAPER)
def coverage(outcomes: Tensor, group_ids: Tensor) -> dict[str, float]:
    """Means over prompts: `pass@k` for k = 1, 2, 4, ... as far as every group reaches, and `miss`."""
    counts = []
    for group in torch.unique(group_ids).tolist():
        own = outcomes[group_ids == group]
        own = own[~own.isnan()]
        if len(own):
            counts.append((int((own > RIGHT).sum()), len(own)))
    if not counts:
        return {"miss": 0.0}
    smallest = min(n for _, n in counts)
    ks = [2**i for i in range(smallest.bit_length()) if 2**i <= smallest]
    found = {f"pass@{k}": sum(pass_at_k(c, n, k) for c, n in counts) / len(counts) for k in ks}
    return found | {"miss": sum((1 - c / n) ** n for c, n in counts) / len(counts)}
