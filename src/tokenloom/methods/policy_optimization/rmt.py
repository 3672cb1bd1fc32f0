"""RMT: reinforcement mid-training, next-token prediction with and without thought on plain text (arXiv 2509.24375).

r = (1 - w) [predicted = next token] + w r_max triangle(l / B)                                              [B]
B = max(B_min, floor(B_0 decay^x)) tokens; x = step / total in [0, 1]; l = the row's thinking tokens
triangle(u) = u up to 1, then 2 - u down to 0 at u = 2: a response is to use its budget, not more
p = p_1 for x < t_1, then linear to p_2 at t_2, p_2 after: from which tier of difficulty tokens are drawn
L = L_RL (GRPO on r) + lambda L_NTP; L_NTP = mean of -log p(token | text before), tokens used for RL left out
The budget stands in the prompt, so an item's own `budget` goes before the schedule. A run without an end stays at
x = 0. The tiers are drawn by the data (`task.tiers`), the text of L_NTP is the recipe's section `corpus`.
Deviations: the sum of L_NTP is a mean over the step's tokens, so that lambda does not depend on their number; w is not
in the source at hand, 0.2 is ours; no KL. Limits: lambda = w = 0 is RPT, GRPO on matching the next token.
Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.length_curriculum import length_reward, thinking_tokens

_PAPER = "arXiv:2509.24375"


@part("rmt", stage="reward", scope="row", paper=_PAPER)
def rmt(
    rewards: Tensor,
    tokens: Tensor,
    mask: Tensor,
    step: int,
    total_steps: int | None,
    prompts: tuple[dict[str, Any], ...] | None = None,
    *,
    length: float = 0.2,
    peak: float = 1.0,
    budget: float = 800.0,
    decay: float = 0.2,
    min_budget: int = 1,
    end_of_thinking: int | None = None,
) -> Tensor:
    """Rewards [B] in [0, 1 - length + length * peak] for outcomes in [0, 1]; NaN stays NaN.

    Raises:
        ValueError: for a share `length` outside [0, 1], or as `token_budget`.
    """
    if not 0 <= length <= 1:
        raise ValueError(f"length is the length reward's share of the reward, in [0, 1], got {length}")
    progress = step / total_steps if total_steps else 0.0
    scheduled = token_budget(progress, budget=budget, decay=decay, min_budget=min_budget)
    stated = [p.get("budget", scheduled) for p in prompts] if prompts is not None else [scheduled] * len(rewards)
    if any(b < 1 for b in stated):
        raise ValueError(f"an item's budget is at least one token, got {min(stated)}")
    budgets = torch.tensor(stated, dtype=rewards.dtype, device=rewards.device)
    used = thinking_tokens(tokens, mask, end_of_thinking).to(rewards.dtype)
    return (1 - length) * rewards + length * peak * length_reward(used, budgets)


def token_budget(progress: float, *, budget: float = 800.0, decay: float = 0.2, min_budget: int = 1) -> int:
    """Tokens that a response may use at `progress` in [0, 1] of the run, a whole number for the prompt to state.

    Raises:
        ValueError: for budgets below one token or a decay outside (0, 1].

    >>> [token_budget(x) for x in (0.0, 0.5, 1.0)]
    [800, 357, 160]
    """
    if budget < 1 or not 0 < decay <= 1 or min_budget < 1:
        raise ValueError(
            f"a budget needs budget >= 1, 0 < decay <= 1, min_budget >= 1, got {budget=}, {decay=}, {min_budget=}"
        )
    # The product may come out a hair below a whole number.
    return max(min_budget, int(budget * decay**progress + 1e-9))


def tier_probabilities(
    progress: float, first: Mapping[str, float], last: Mapping[str, float], *, begin: float = 0.3, end: float = 0.7
) -> dict[str, float]:
    """The share of each tier at `progress` in [0, 1]: `first` until `begin`, linear to `last` at `end`, `last` after.

    Raises:
        ValueError: unless both name the same tiers with shares >= 0 that sum to 1, and 0 <= begin < end <= 1.

    >>> tier_probabilities(0.5, {"easy": 1.0, "hard": 0.0}, {"easy": 0.5, "hard": 0.5}, begin=0.25, end=0.75)
    {'easy': 0.75, 'hard': 0.25}
    """
    if first.keys() != last.keys():
        raise ValueError(f"both ends need a share for every tier: {sorted(first)} against {sorted(last)}")
    if not 0 <= begin < end <= 1:
        raise ValueError(f"the shares move between two moments of the run: 0 <= begin < end <= 1, got {begin=}, {end=}")
    for shares in (first, last):
        if min(shares.values(), default=-1.0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of the tiers are >= 0 and sum to 1, got {dict(shares)}")
    x = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    return {tier: (1 - x) * share + x * last[tier] for tier, share in first.items()}


@part("rmt/next-token", stage="term", scope="token", paper=_PAPER)
def next_token(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the text's own tokens, [B, T] in nats, a loss."""
    return -where_mask(logprobs, mask)


@preset("rmt", paper=_PAPER)
def rmt_preset(
    *,
    length: float = 0.2,
    peak: float = 1.0,
    budget: float = 800.0,
    decay: float = 0.2,
    min_budget: int = 1,
    end_of_thinking: int | None = None,
    ntp_coef: float = 0.1,
) -> Algorithm:
    """GRPO on matching the next token within a shrinking budget, beside next-token prediction on the same text.

    With `ntp_coef` 0 there is no term over a corpus, and the recipe needs no text for it.
    """
    reward = {
        "part": "rmt", "length": length, "peak": peak, "budget": budget, "decay": decay, "min_budget": min_budget,
        "end_of_thinking": end_of_thinking,
    }  # fmt: skip
    corpus = [{"part": "rmt/next-token", "coef": ntp_coef, "aggregate": "token-mean"}] if ntp_coef != 0 else []
    return Algorithm.from_recipe({"preset": "grpo", "kl_coef": 0.0}).override(reward=[reward], corpus=corpus)
