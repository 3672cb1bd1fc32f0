"""DAPO: four separable changes to GRPO for long responses (arXiv 2503.14476).

1. clip-higher: bounds 1 - 0.2, 1 + 0.28 (`clip`)        2. token mean over the batch (`token-mean`)
3. dynamic sampling: drop groups whose outcomes are all equal and sample others in their place
4. overlong penalty on the reward, with L_max the longest response and L_cache a margin before it:
   0 up to L_max - L_cache, then falling linearly to -1 at L_max; or instead the overlong filter, which drops
   responses that were cut by length.
No KL. Dynamic sampling looks at the verifier's outcome, not at the shaped reward. Deviations: the penalty is clamped
to [-1, 0], where verl relies on L <= L_max. Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_constant


@part("dapo/overlong-penalty", stage="reward", scope="row", paper="arXiv:2503.14476")
def overlong_penalty(
    rewards: Tensor, lengths: Tensor, max_tokens: int | None = None, *, length: int | None = None,
    cache: float = 0.2, factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """Rewards [B] plus factor * penalty in [-1, 0].

    `length` is L_max in tokens (default `max_tokens`); `cache` is L_cache in tokens, or a fraction of L_max
    below 1 (the paper's 4096 of 20480 is 0.2). Where nobody said how long a response may be, none is overlong.

    Raises:
        ValueError: when the cache does not lie in (0, L_max].

    >>> import torch
    >>> overlong_penalty(torch.zeros(3), torch.tensor([80, 90, 100]), 100, cache=20)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    longest = length or max_tokens
    if longest is None:
        return rewards
    margin = cache * longest if cache < 1 else cache
    if not 0 < margin <= longest:
        raise ValueError(f"the cache must lie in (0, {longest}] tokens, got {margin:g}")
    return rewards + factor * ((longest - margin - lengths) / margin).clamp(-1, 0).to(rewards.dtype)


@part("dapo/dynamic-sampling", stage="select", scope="group", paper="arXiv:2503.14476", refill=True)
def dynamic_sampling(outcomes: Tensor, group_ids: Tensor) -> Tensor:
    """Rows [B] bool to keep: those of groups whose scorable outcomes differ."""
    return ~group_constant(outcomes, group_ids, ~outcomes.isnan())


@part("dapo/overlong-filter", stage="select", scope="row", paper="arXiv:2503.14476")
def overlong_filter(truncated: Tensor) -> Tensor:
    """Rows [B] bool to keep: those that ended by themselves."""
    return ~truncated


@preset("dapo", paper="arXiv:2503.14476")
def dapo_preset(
    *,
    dynamic_sampling: bool = True,
    overlong: Literal["penalty", "filter", "none"] = "penalty",
    low: float = 0.2,
    high: float = 0.28,
    dialect: Literal["paper", "verl", "trl"] = "paper",
) -> Algorithm:
    """DAPO; each of its four parts can be switched. Dialect "trl": std eps 1e-4, no dynamic sampling, no penalty;
    "verl": the dual clip of its recipe's scripts, cap 10.
    """
    if dialect == "trl":
        dynamic_sampling, overlong = False, "none" if overlong == "penalty" else overlong
    select: list[Any] = ["dapo/dynamic-sampling"] if dynamic_sampling else []
    return Algorithm.compose(
        reward=["dapo/overlong-penalty"] if overlong == "penalty" else [],
        advantage={"part": "grpo", "eps": 1e-4 if dialect == "trl" else 1e-6},
        select=select + (["dapo/overlong-filter"] if overlong == "filter" else []),
        surrogate="dual-clip" if dialect == "verl" else "ppo-clip",
        bounds={"part": "clip", "low": low, "high": high, "cap": 10.0 if dialect == "verl" else None},
        aggregate="token-mean",
    )
