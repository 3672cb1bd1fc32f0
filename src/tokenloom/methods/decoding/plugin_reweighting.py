"""Plugin: adapt a closed model by multiplying its next-token law with that of a small trained one (arXiv 2502.06806).

p(v | context) is proportional to b(v | context) r(v | context)                                           [B, V]
b is the frozen model's law, r the softmax of a small model with the same vocabulary. r is trained by the cross-entropy
of the product, loss = -log softmax(log b + log r)[y], in which b is a constant. Where only the top k log-probs of b are
to be had, `from_top_logprobs` fills in the rest.
Limits: r uniform leaves b; the factors commute. On tables the optimum is the empirical law wherever b > 0.
Deviations: none known. Fidelity: paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("plugin-reweighting", stage="shape", scope="row", paper="arXiv:2502.06806")
def plugin_reweighting(scores: Tensor, plugin_scores: Tensor) -> Tensor:
    """Scores [B, V] of the product from those of the model and of the plugin."""
    return scores + plugin_scores.log_softmax(-1)


@part("plugin-reweighting/loss", stage="objective", scope="token", paper="arXiv:2502.06806")
def plugin_loss(base_scores: Tensor, plugin_scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [...] of the product for `labels` [...]; scores are [..., V] and the base's are detached.

    Raises:
        ValueError: for scores of different shapes.
    """
    if base_scores.shape != plugin_scores.shape:
        raise ValueError(
            f"the plugin must share the base's vocabulary: scores {tuple(plugin_scores.shape)} for "
            f"{tuple(base_scores.shape)}"
        )
    wide = torch.promote_types(plugin_scores.dtype, torch.float32)
    product = base_scores.detach().to(wide).log_softmax(-1) + plugin_scores.to(wide).log_softmax(-1)
    return -product.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def from_top_logprobs(
    ids: Tensor, logprobs: Tensor, vocab: int, *, missing: Literal["smallest", "impossible"] = "smallest"
) -> Tensor:
    """Scores [B, V] of a model that tells only `logprobs` [B, k] of the tokens `ids` [B, k].

    All other tokens get the smallest of them, or -inf. Softmax of the result renormalizes.
    """
    rest = logprobs.amin(-1, keepdim=True) if missing == "smallest" else logprobs.new_full((len(ids), 1), -torch.inf)
    return rest.repeat(1, vocab).scatter(-1, ids, logprobs)
