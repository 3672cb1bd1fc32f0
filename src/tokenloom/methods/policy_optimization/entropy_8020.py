"""80/20 rule: only the tokens with the highest entropy are trained on (arXiv 2506.01939).

weights = [H >= (1 - rho)-quantile of H over all sampled tokens of the batch]           [B, T] of 0 and 1
The quantile interpolates linearly; ties at the threshold are kept, so more than rho may survive.
Weights multiply the policy term only, and by default do not enter the normalizer, as in the paper and TRL.
Deviations: the quantile is over the whole batch (TRL's gather), where the paper takes the micro-batch, which
would make the gradient depend on the split. Limit: rho = 1 keeps everything. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import masked_quantile


@part("entropy-8020", stage="weight", scope="batch", paper="arXiv:2506.01939")
def entropy_8020(entropies: Tensor, mask: Tensor, *, rho: float = 0.2) -> Tensor:
    """Weights [B, T] of 0 and 1; `rho` is the fraction of tokens kept.

    Raises:
        ValueError: for rho outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho is the fraction of tokens that are trained on, in (0, 1]; got {rho}")
    if rho == 1:
        return mask.to(entropies.dtype)
    return (mask & (entropies.detach() >= masked_quantile(entropies.detach(), mask, 1 - rho))).to(entropies.dtype)


@preset("entropy-8020", paper="arXiv:2506.01939")
def entropy_8020_preset(*, dialect: Literal["paper", "trl"] = "paper", rho: float = 0.2) -> Algorithm:
    """DAPO's objective on the high-entropy fifth of the tokens; "trl": GRPO in TRL's reading with the same mask."""
    base = Algorithm.from_recipe("dapo" if dialect == "paper" else {"preset": "grpo", "dialect": "trl"})
    return base.override(weight=[{"part": "entropy-8020", "rho": rho}])
