"""R2R without training: ask the large model while the small one's uncertainty stays high (arXiv 2505.21600, code).

Uncertainty, from the K = 10 largest logits x_i of the small model taken as evidence (LogU, arXiv 2502.00290),
S = sum x_i:
    aleatoric = -sum_i (x_i / S) (psi(x_i + 1) - psi(S + 1))      the mean entropy under a Dirichlet law, nats
    epistemic = K / (S + K)
Rolling window: a row is with one of the models, the large one at first.
    with the small one: ask the large one if a_t >= threshold and H_t >= entropy; the window then holds a_t alone
    with the large one: a_t joins the window of the last W; back to the small one if the window's mean < threshold
At most log K for the aleatoric one, near which the threshold 2.275 lies: log 10 = 2.303.

Shapes: scores [B, V], a and H [B], window [B, W] with NaN where nothing is yet, asking [B] bool.
Limits: W = 1 and entropy = 0 asks exactly where a_t >= threshold; entropy = 0 and carry = False is the code's form with
two windows, which does not count the token that asked. Deviations: logits below 0 are no evidence (the code's digamma
has poles there); without any evidence the aleatoric uncertainty is its limit, 0. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.r2r import PAPER


@part("r2r/uncertainty", stage="analysis", scope="row", paper="arXiv:2502.00290")
def uncertainty(scores: Tensor, *, top: int = 10) -> tuple[Tensor, Tensor]:
    """Aleatoric [B], in nats, and epistemic [B] uncertainty of logits [B, V], float32 at least.

    Raises:
        ValueError: for fewer than one logit.
    """
    if top < 1:
        raise ValueError(f"r2r: uncertainty is read from the largest logits, 1 or more; got top={top}")
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    evidence = wide.topk(min(top, scores.shape[-1]), -1).values.clamp(min=0)
    total = evidence.sum(-1, keepdim=True)
    law = evidence / torch.where(total > 0, total, 1.0)
    # The digammas' difference would lose all digits of large logits in float32.
    terms = (torch.digamma(evidence.double() + 1) - torch.digamma(total.double() + 1)).to(wide.dtype)
    count = evidence.shape[-1]
    return -(law * terms).sum(-1), count / (total[:, 0] + count)


@part("r2r/window", stage="choose", scope="row", paper=PAPER)
def route_by_window(
    aleatoric: Tensor, entropies: Tensor, window: Tensor, asking: Tensor,
    *, threshold: float = 2.275, entropy: float = 0.02, carry: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which rows [B] the large model takes now, and the window [B, W] from here on; `asking` [B] is the last answer.

    With `carry` the uncertainty that asked counts in the window that it opens. A row that is with the small model has
    an empty window.
    """
    with_large = torch.cat((window[:, 1:], aleatoric[:, None].to(window.dtype)), -1)
    stays = ~(with_large.nanmean(-1) < threshold)
    leaves = (aleatoric >= threshold) & (entropies >= entropy)
    asks = torch.where(asking, stays, leaves)
    opened = torch.full_like(window, torch.nan)
    if carry:
        opened[:, -1] = aleatoric.to(window.dtype)
    kept = torch.where(asking[:, None], with_large, opened)
    return asks, torch.where(asks[:, None], kept, torch.nan)


def no_window(rows: int, *, size: int = 3, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The empty window [B, W] and the answer [B] before the first token: rows begin with the large model."""
    return (
        torch.full((rows, size), torch.nan, device=device),
        torch.ones(rows, dtype=torch.bool, device=device),
    )
