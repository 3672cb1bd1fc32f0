"""Locally typical sampling: tokens whose surprisal is near the expected one (arXiv 2202.00666).

shift_v = |-log p_v - H(p)|; in ascending order of shifts, the fewest tokens that hold a share `mass`        [B, V]
The token that crosses `mass` is kept, and so is every token that shifts no more than it does; uniform laws are kept
whole. The most probable token may go: that is the method's point. Limit: mass = 1 keeps every possible token.
Deviations: none. Fidelity: code (transformers' `TypicalLogitsWarper`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.selection import last_kept


@part("locally-typical", stage="truncate", scope="row", paper="arXiv:2202.00666")
def locally_typical(probs: Tensor, *, mass: float = 0.95) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"locally-typical: mass is a share of the probability in (0, 1], got {mass}")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    surprisals = -probs.log()
    entropy = (probs * surprisals).nansum(-1, keepdim=True)  # 0 times infinity is 0 here
    shifts = (surprisals - entropy).abs()
    most, _ = last_kept(shifts, probs, 1 - mass, descending=False)
    return shifts <= most
