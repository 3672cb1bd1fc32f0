"""TreeBoN: best-of-N in layers, with the implicit reward of a preference-tuned model in between (arXiv 2410.16033).

reward(y) = sum_t (1/t) [log p_aligned(y_t | .) - log p_ref(y_t | .)],    t = 1 .. |y| within the response
layer     of N candidates the N / N_child best are parents of N_child candidates each, one segment longer

Limits: one layer is best-of-N, and so is N_child = 1. Deviations: every log-prob is read at the position that
predicts the token, which third-party code misses. Fidelity: paper; weights as in third-party code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("tree-bon", stage="rank", scope="row", paper="arXiv:2410.16033")
def implicit_reward(aligned_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The weighted sum of log-ratios of responses' tokens, [..., T] -> [...]; both log-probs at temperature 1."""
    ratio = aligned_logprobs - ref_logprobs
    weights = 1 / torch.arange(1, ratio.shape[-1] + 1, dtype=ratio.dtype, device=ratio.device)
    return (ratio * weights).sum(-1)


@part("tree-bon/parents", stage="search", scope="group", paper="arXiv:2410.16033")
def parents(rewards: Sequence[float], *, n: int = 16, children: int = 4) -> list[int]:
    """Indices of the n / children best of `rewards`, in the order in which they stand; the first among equals.

    Raises:
        ValueError: unless children divides n.
    """
    if n < 1 or children < 1 or n % children:
        raise ValueError(f"tree-bon: n = {n} candidates are no multiple of {children} children; choose n as one")
    return sorted(sorted(range(len(rewards)), key=lambda i: -rewards[i])[: n // children])
