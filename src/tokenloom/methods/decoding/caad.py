"""CAAD: add the scores that a model had in similar, trusted contexts (arXiv 2508.02184).

Store: for each answer position of some trusted examples, the embedding of the text so far and the scores of what
follows. Decoding: s_i = cosine of the text so far and stored context i, the `top_n` highest of at least `threshold`,
w = softmax(s / temperature),   z' = z + alpha max(mean s, 0) sum_i w_i z_i                                  [B, V]
so that unrelated contexts change nothing. Limits: an empty store, or alpha = 0, changes nothing; one identical context
and alpha -> infinity is its own arg-max. The order of the store does not matter.
Deviations: unknown. Fidelity: reconstructed from the abstract (retrieval of the top N and aggregation of their scores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("caad", stage="shape", scope="row", paper="arXiv:2508.02184")
def caad(
    scores: Tensor,
    contexts: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    alpha: float = 0.5,
    top_n: int = 10,
    temperature: float = 0.1,
    threshold: float = 0.0,
) -> Tensor:
    """Scores [B, V] from the model's, embeddings `contexts` [B, E], and a store of keys [n, E] and values [n, V].

    Raises:
        ValueError: for a top_n below 1 or a temperature not above 0.
    """
    if top_n < 1 or not temperature > 0:
        raise ValueError(f"caad: top_n must be 1 or more and temperature above 0, got {top_n} and {temperature}")
    if len(keys) == 0 or alpha == 0:
        return scores.clone()
    wide = torch.promote_types(scores.dtype, torch.float32)
    one, other = (torch.nn.functional.normalize(x.to(wide), dim=-1) for x in (contexts, keys))
    found, at = (one @ other.T).topk(min(top_n, len(keys)))
    near = found >= threshold
    some = near.any(-1, keepdim=True)
    weights = torch.where(near, found / temperature, -torch.inf).masked_fill(~some, 0.0).softmax(-1)
    reference = torch.einsum("bn,bnv->bv", weights, values[at].to(wide))
    mean = torch.where(near, found, 0.0).sum(-1, keepdim=True) / near.sum(-1, keepdim=True).clamp(min=1)
    return scores + (alpha * mean.clamp(min=0) * reference).to(scores.dtype)
