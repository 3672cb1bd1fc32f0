"""CTPO: each token is weighted by the likelihood ratio of its whole prefix, clipped wider as it grows
(arXiv 2605.07331).

log R_t = sg(sum_{u <= t} (logprobs - old_logprobs)_u) + logprobs_t - sg(logprobs_t)    [B, T]
lo, hi, cap = exp(-low n^p), exp(high n^p), exp(cap n^p), n = sampled tokens up to t (tool tokens do not count)
R_t is what makes old samples unbiased for a function of the prefix and token t: E_old[R_t f] = E_new[f]. It is a
detached weight: the gradient of the product would push earlier tokens once more. A log-ratio walks like sqrt(t),
hence p = 1/2. Terms are clamped to +-20, R's logarithm to at most 10. mode="geomean" takes the mean of the terms
instead of their sum, with p = -1/2. As cap = high, negative tokens lose their gradient above hi as well (dual clip).

Deviations: none; p = 0, where the released code fails, is a uniform clip. Limits: one token is the token ratio; the
last token has the sequence ratio. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import LOG_RATIO_LIMIT, where_mask
from tokenloom.methods.policy_optimization.clip import INFINITY
from tokenloom.methods.policy_optimization.token_ratio import token_ratio


@part("ctpo", stage="log_ratio", scope="row", paper="arXiv:2605.07331")
def ctpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: Literal["cumprod", "geomean"] = "cumprod",
    limit: float = 10.0,
) -> Tensor:
    """Log-ratio [B, T] of the prefix up to each token, d/d logprobs = 1 for the own token, zero off the mask.

    >>> import torch
    >>> one, zero = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3)
    >>> ctpo(torch.tensor([[0.5, 0.25, -1.0]]), zero, one)
    tensor([[ 0.5000,  0.7500, -0.2500]])
    """
    terms = token_ratio(logprobs.detach(), old_logprobs, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    prefix = terms.cumsum(-1)
    if mode == "geomean":
        prefix = prefix / mask.cumsum(-1).clamp(min=1)
    own = where_mask(logprobs, mask)
    # The difference is exactly 0 only when taken first; (prefix + own) - own would lose digits next to a tight clip.
    return where_mask((prefix + (own - own.detach())).clamp(max=limit), mask)


@part("ctpo/bounds", stage="bounds", scope="row", paper="arXiv:2605.07331")
def position_bounds(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    low: float = 0.025,
    high: float = 0.05,
    cap: float | None = 0.05,
    power: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Limits (lo, hi, cap) of the ratio, each [B, T]; the widths are those of log R at the first token.

    `log_ratio` lends its dtype. `cap=None` means no limit for negative advantages.

    Raises:
        ValueError: for a negative width.
    """
    if min(low, high, high if cap is None else cap) < 0:
        raise ValueError(f"ctpo's widths must be >= 0, got low={low}, high={high}, cap={cap}")
    growth = mask.cumsum(-1).clamp(min=1).to(log_ratio.dtype) ** power
    return (-low * growth).exp(), (high * growth).exp(), INFINITY if cap is None else (cap * growth).exp()


@preset("ctpo", paper="arXiv:2605.07331")
def ctpo_preset(
    *, mode: Literal["cumprod", "geomean"] = "cumprod", mini_batches: int = 4, sampler_cap: float | None = 5.0
) -> Algorithm:
    """GRPO's advantage, cumulative ratio, bounds by position, dual clip, token mean, no KL.

    Several updates per batch, the paper's are 16; in a single one all ratios are 1 and nothing is corrected.

    `sampler_cap` truncates the sequence weight against the sampling engine (TIS); None leaves it out.
    """
    return Algorithm.compose(
        advantage="grpo",
        surrogate="dual-clip",
        log_ratio={"part": "ctpo", "mode": mode},
        bounds={"part": "ctpo/bounds", "power": 0.5 if mode == "cumprod" else -0.5},
        aggregate="token-mean",
        weight=[] if sampler_cap is None else [{"part": "tis", "level": "sequence", "maximum": sampler_cap}],
        updates={"part": "mini-batches", "mini_batches": mini_batches},
    )
