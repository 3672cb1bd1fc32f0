"""GSPO-token: the sequence ratio's value with each token's own gradient (arXiv 2507.18071, eq. 14).

log s_it = sg(log s_i) + logprobs_t - sg(logprobs_t)                                    [B, T]
Allows advantages that differ within a response; with a row-constant advantage it has GSPO's gradient
under the sequence mean. Deviations: none. Fidelity: code.
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.gspo import sequence_log_ratio


@part("gspo-token", stage="log_ratio", scope="row", paper="arXiv:2507.18071")
def gspo_token(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, limit: float = 10.0) -> Tensor:
    """Log-ratio [B, T]: the row's value, d/d logprobs = 1 for the own token, zero off the mask."""
    value = sequence_log_ratio(logprobs.detach(), old_logprobs, mask, limit=float("inf"))
    own = where_mask(logprobs, mask)
    # The difference is exactly 0 only when taken first; (value + own) - own would lose digits next to a tight clip.
    return where_mask((value + (own - own.detach())).clamp(max=limit), mask)


@preset("gspo-token", paper="arXiv:2507.18071")
def gspo_token_preset(*, low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    """GSPO-token: as GSPO, with token-wise gradients."""
    return Algorithm.from_recipe("gspo").override(log_ratio="gspo-token", bounds={"low": low, "high": high})
