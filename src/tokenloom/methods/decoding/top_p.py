"""Top-p (nucleus) sampling: the fewest most probable tokens that hold a share p of the mass (arXiv 1904.09751).

In descending order, keep_v = (mass before v) < p, so that the token that crosses p is kept                  [B, V]
Equal tokens stand in the order of their ids. Read from the tail, the condition is (mass from v on) > 1 - p, which is
how it is computed: the tail's small masses are added first and none is lost in rounding, so p = 1 keeps every possible
token. Deviations: none. Fidelity: code (transformers' `TopPLogitsWarper`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.selection import keep_down_to, last_kept


@part("top-p", stage="truncate", scope="row", paper="arXiv:1904.09751")
def top_p(probs: Tensor, *, p: float = 0.9) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for p outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top-p: p is a share of the mass in (0, 1], got {p}")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    least, without = last_kept(probs, probs, 1 - p, descending=True)
    return keep_down_to(probs, least, without)
