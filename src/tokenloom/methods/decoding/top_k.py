"""Top-k sampling: the k most probable tokens (arXiv 1805.04833).

keep_v = p_v >= the k-th largest p                                                                        [B, V]
Tokens that tie with the k-th are all kept, as in transformers; k beyond the vocabulary keeps every possible token.
Deviations: tokens without probability are never kept. Fidelity: code (transformers' `TopKLogitsWarper`).
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.selection import largest


@part("top-k", stage="truncate", scope="row", paper="arXiv:1805.04833")
def top_k(probs: Tensor, *, k: int = 50) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for k below 1.
    """
    if k < 1:
        raise ValueError(f"top-k keeps at least one token: k must be 1 or more, got {k}")
    smallest = largest(probs, min(k, probs.shape[-1]))[:, -1:]
    keep = probs >= smallest
    return keep if bool((smallest > 0).all()) else keep & (probs > 0)
