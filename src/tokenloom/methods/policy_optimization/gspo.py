"""GSPO: one length-normalized importance ratio for the whole response (arXiv 2507.18071, eq. 7).

log s_i = sum_t (logprobs - old_logprobs) / len_i, the same for every token of row i    [B, T]
Every token's gradient flows through every entry, so that clipping drops or keeps whole responses.
normalize=False gives the plain sequence ratio (the product of token ratios), as TRL's RLOO uses.
limit clamps the log-ratio from above (verl: 10; TRL does not, its dialects take the library's guard of 20).
Limit: one sampled token is GRPO's ratio. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import LOG_RATIO_LIMIT, where_mask
from tokenloom.methods.policy_optimization.token_ratio import token_ratio


@part("gspo", stage="log_ratio", scope="row", paper="arXiv:2507.18071")
def gspo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, normalize: bool = True, limit: float = 10.0
) -> Tensor:
    """Log-ratio [B, T], constant along each row's sampled tokens, zero off the mask.

    >>> import torch
    >>> one, zero = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    >>> gspo(torch.tensor([[0.2, 0.1]]), zero, one).exp()
    tensor([[1.1618, 1.1618]])
    """
    return where_mask(sequence_log_ratio(logprobs, old_logprobs, mask, normalize, limit).expand(mask.shape), mask)


def sequence_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, normalize: bool = True, limit: float = 10.0
) -> Tensor:
    """Log of the (length-normalized) sequence ratio, [B, 1], with gradient; 0 for rows without sampled tokens."""
    total = token_ratio(logprobs, old_logprobs, mask).sum(-1, keepdim=True)
    if normalize:
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return total.clamp(max=limit)


@preset("gspo", paper="arXiv:2507.18071")
def gspo_preset(*, dialect: Literal["paper", "trl"] = "paper", low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    """GSPO: sequence ratio, tight clip 3e-4 / 4e-4, mean over rows, no KL. Dialect "trl": std eps 1e-4."""
    return Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-4 if dialect == "trl" else 1e-6},
        log_ratio={"part": "gspo", "limit": LOG_RATIO_LIMIT} if dialect == "trl" else "gspo",
        bounds={"part": "clip", "low": low, "high": high},
        aggregate={"part": "sequence-mean", "rows": "all" if dialect == "trl" else "live"},
    )
