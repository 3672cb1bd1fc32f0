"""Epsilon sampling: an absolute threshold (arXiv 2210.15191).

keep_v = p_v >= epsilon or p_v = max p                                                                    [B, V]
Deviations: none. Fidelity: code (transformers' `EpsilonLogitsWarper`).
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part


@part("epsilon-sampling", stage="truncate", scope="row", paper="arXiv:2210.15191")
def epsilon_sampling(probs: Tensor, *, epsilon: float = 3e-4) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for epsilon outside (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon-sampling: epsilon is a probability in (0, 1), got {epsilon}")
    return probs >= probs.amax(-1, keepdim=True).clamp(max=epsilon)
