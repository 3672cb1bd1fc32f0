"""Min-p sampling: a threshold that scales with the most probable token (arXiv 2407.01082).

keep_v = p_v >= min_p * max p                                                                             [B, V]
What it keeps depends on ratios of probabilities alone: removing other tokens, the maximum apart, changes nothing. It
commutes with temperature only in the sense that it is to be applied after it. Limit: min_p = 1 keeps the maximum and
its ties. Deviations: none. Fidelity: code (transformers' `MinPLogitsWarper`).
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part


@part("min-p", stage="truncate", scope="row", paper="arXiv:2407.01082")
def min_p(probs: Tensor, *, min_p: float = 0.1) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for min_p outside [0, 1].
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min-p is a share of the largest probability in [0, 1], got {min_p}")
    return probs >= min_p * probs.amax(-1, keepdim=True)
