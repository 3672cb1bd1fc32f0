"""Eta sampling: an absolute threshold that gives way where the law is uncertain (arXiv 2210.15191).

eta = min(epsilon, sqrt(epsilon) exp(-H(p))),   keep_v = p_v >= eta or p_v = max p                         [B, V]
H in nats. Limit: laws of low entropy, exp(-H) >= sqrt(epsilon), are cut as epsilon sampling does. Deviations: none.
Fidelity: code (transformers' `EtaLogitsWarper`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("eta-sampling", stage="truncate", scope="row", paper="arXiv:2210.15191")
def eta_sampling(probs: Tensor, *, epsilon: float = 3e-4) -> Tensor:
    """Keep [B, V] bool from probs [B, V].

    Raises:
        ValueError: for epsilon outside (0, 1).
    """
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    return probs >= torch.minimum(eta_threshold(probs, epsilon)[:, None], probs.amax(-1, keepdim=True))


def eta_threshold(probs: Tensor, epsilon: float) -> Tensor:
    """eta [B] of probs [B, V].

    Raises:
        ValueError: for epsilon outside (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"eta-sampling: epsilon is a probability in (0, 1), got {epsilon}")
    # Minus the entropy; 0 times minus infinity is 0 here.
    negentropy = (probs * probs.log()).nansum(-1)
    return (math.sqrt(epsilon) * negentropy.exp()).clamp(max=epsilon)
