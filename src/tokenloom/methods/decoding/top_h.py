"""Top-H sampling: bound the entropy of what is kept by a share of the entropy of all (arXiv 2509.02510).

The set of most mass whose own law has H(p_S / p(S)) <= alpha H(p) is hard to find; both variants grow it greedily in
descending order, the maximum always included, until the bound is passed for the first time:
"paper":     H(p_S / p(S)) <= alpha H(p), the entropy of the law cut off and renormalized, over the whole vocabulary;
"released":  sum_{i in S} -p_i log p_i <= alpha H(p), p renormalized to the `top_n` largest. These partial sums grow
             with S without being an entropy, so it keeps other sets than the paper's, most often fewer tokens.
Deviations: equal tokens stand in the order of their ids (the official code leaves that to the sort); a vocabulary below
`top_n` is taken whole; alpha = 1 keeps everything possible instead of reading past the end. In float32 the base of the
logarithm does not matter. Fidelity: code ("released" as in transformers' `TopHLogitsWarper`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.selection import keep_largest, largest

# The paper's bound is mostly passed within so many tokens.
_MOSTLY = 512


@part("top-h", stage="truncate", scope="row", paper="arXiv:2509.02510")
def top_h(
    probs: Tensor, *, alpha: float = 0.4, top_n: int = 100, variant: Literal["paper", "released"] = "released"
) -> Tensor:
    """Keep [B, V] bool from probs [B, V]; `top_n` is for "released" only.

    Raises:
        ValueError: for alpha outside (0, 1] or top_n below 1.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"top-h: alpha is a share of the entropy in (0, 1], got {alpha}")
    if top_n < 1:
        raise ValueError(f"top-h looks at the top_n most probable tokens, at least 1, got {top_n}")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    vocab = probs.shape[1]
    if variant == "released":
        found = largest(probs, min(top_n + 1, vocab))
        masses = found[:, :top_n]
        masses = masses / masses.sum(-1, keepdim=True)
        entropies = torch.special.entr(masses).cumsum(-1)
        return keep_largest(probs, found, _count(masses, entropies, entropies[:, -1:], alpha))
    whole = _entropies(probs)[:, -1:]
    for k in (min(_MOSTLY, vocab), vocab):
        found = largest(probs, k)
        count = _count(found, _entropies(found), whole, alpha)
        if bool((count < k).all()):
            break
    return keep_largest(probs, found, count)


def _entropies(masses: Tensor) -> Tensor:
    """[B, k]: of the laws of the first 1 .. k of `masses` [B, k]; H(p_S / Z) = log Z + (sum of -p log p) / Z."""
    total = masses.cumsum(-1)
    found: Tensor = total.log() + torch.special.entr(masses).cumsum(-1) / total
    return found


def _count(masses: Tensor, entropies: Tensor, whole: Tensor, alpha: float) -> Tensor:
    """How many [B, 1] of `masses` come before the first whose entropy passes the bound, one at least."""
    # At alpha = 1 the last entropy is the bound itself, up to rounding: nothing passes it.
    within = (entropies > alpha * whole).cumsum(-1) == 0 if alpha < 1 else torch.ones_like(masses, dtype=torch.bool)
    return (within & (masses > 0)).sum(-1, keepdim=True).clamp(min=1)
