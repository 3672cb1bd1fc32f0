"""Token ratio: each token's own importance ratio (PPO, arXiv 1707.06347).

log_ratio_t = logprobs_t - old_logprobs_t                                            [B, T]
Exactly zero, with gradient 1, on policy. Fidelity: code.
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import where_mask


@part("token-ratio", stage="log_ratio", scope="token", paper="arXiv:1707.06347")
def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-ratio [B, T] per token, zero off the mask."""
    return where_mask(logprobs, mask) - where_mask(old_logprobs.detach(), mask)
