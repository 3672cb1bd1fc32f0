"""VISTA: steer hidden states towards what a context adds, and let late layers speak in the logits (arXiv 2502.03628).

d_l = h_l(prompt with the context) - h_l(prompt without it), after layer l at the prompt's last token    [Lyr, D]
x' = |x| normalize(x / |x| + y_l), y_l = lambda (1 + max(0, cos(x, -d_l))) d_l / |d_l|     x an MLP's output, [..., D]
z' = (1 - gamma) z + gamma mean_{l in [a, b]} head(h_l)                                                       [B, V]
In the paper the context is an image; here anything that a prompt can be given with and without.

Several pairs: d is the mean difference plus the first principal direction of the differences.
Limits: lambda = 0 and gamma = 0 are the model; the norm of x never changes.
Deviations: the principal direction points to the side of the mean (in the release its sign is that of its largest
projection). Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokenloom.catalog import part

PAPER = "arXiv:2502.03628"


@part("vista", stage="shape", scope="row", paper=PAPER)
def self_logits_augmentation(scores: Tensor, layer_scores: Tensor, *, gamma: float = 0.3) -> Tensor:
    """Scores [..., V] mixed with the mean of those of late layers [L, ..., V]."""
    return (1 - gamma) * scores + gamma * layer_scores.mean(0)


@part("vista/steer", stage="shape", scope="row", paper=PAPER)
def steer(hidden: Tensor, direction: Tensor, *, strength: float = 0.1) -> Tensor:
    """Hidden states [..., D] turned towards `direction` [D] (or [..., D]), the more the farther they point away.

    Their norm stays. At least float32 inside, the format of `hidden` outside.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x, d = hidden.to(wide), direction.to(hidden.device, wide)
    away = cosine_similarity(x, -d, dim=-1).clamp(min=0.0)[..., None]
    turned = normalize(normalize(x, dim=-1) + strength * (1 + away) * normalize(d, dim=-1), dim=-1)
    result: Tensor = (turned * x.norm(dim=-1, keepdim=True)).to(hidden.dtype)
    return result


@part("vista/direction", stage="analysis", scope="batch", paper=PAPER)
def steering_directions(with_context: Tensor, without_context: Tensor) -> Tensor:
    """Directions [Lyr, D] from hidden states [N, Lyr, D] of N prompts with and without their context.

    Raises:
        ValueError: for tensors of different or other shapes.
    """
    if with_context.shape != without_context.shape or with_context.ndim != 3:
        raise ValueError(
            f"vista: states with and without the context must both be [N, Lyr, D], got {tuple(with_context.shape)} "
            f"and {tuple(without_context.shape)}"
        )
    difference = with_context - without_context
    mean = difference.mean(0)
    if len(difference) == 1:
        return mean
    spread = (difference - mean).transpose(0, 1)  # [Lyr, N, D]
    first = torch.linalg.svd(spread, full_matrices=False).Vh[:, 0]
    side = torch.where((first * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0).to(first.dtype)
    total: Tensor = mean + side * first
    return total
