"""Soft Thinking: while it reasons, a model reads mixtures of tokens instead of tokens (arXiv 2505.15778).

p = softmax(z / tau); keep the top k, then the top p, then p >= min_p max p, then the `max_topk` largest; q is p on
these, renormalized (after each step). Next input: sum_j q_j E[id_j]; the recorded token is the most probable.
Cold stop: the end-of-thinking token is forced at the length-th step in a row with H(p) < threshold, H before the cuts.

Shapes: probs [B, V], q and ids [B, M] with M = max_topk, zeros behind the last kept. Entropies in nats.
Limits: max_topk = 1 is discrete decoding by the most probable token; threshold <= 0 never stops. Deviations: the
noise of the code (Dirichlet, Gumbel), which the paper has not, is left out. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2505.15778"


@part("soft-thinking", stage="choose", scope="row", paper=PAPER)
def concept(
    probs: Tensor, *, top_k: int = 30, top_p: float = 0.95, min_p: float = 0.001, max_topk: int = 10
) -> tuple[Tensor, Tensor]:
    """Weights q [B, M], which sum to 1, and ids [B, M] of a mixture, most probable first, ties by lowest id.

    Raises:
        ValueError: for cuts that keep nothing.
    """
    if min(top_k, max_topk) < 1 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            f"soft-thinking: needs top_k and max_topk >= 1, 0 < top_p <= 1 and 0 <= min_p <= 1, got {top_k}, "
            f"{max_topk}, {top_p} and {min_p}"
        )
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    kept = _normalized(ordered[:, :top_k])
    before = kept.cumsum(-1) - kept
    kept = _normalized(torch.where(before < top_p, kept, 0.0))
    kept = torch.where(kept >= min_p * kept[:, :1], kept, 0.0)[:, :max_topk]
    return _normalized(kept), ids[:, : kept.shape[1]]


@part("soft-thinking/mixture", stage="choose", scope="row", paper=PAPER)
def mixture(weights: Tensor, embeddings: Tensor) -> Tensor:
    """sum_j q_j E_j [B, D] of weights [B, M], embeddings [B, M, D]; a weight of 1 gives its embedding bit by bit."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    # Left out, not multiplied by 0: an embedding that is not finite has no part in a mixture without it.
    terms = torch.where(weights[..., None] > 0, weights[..., None].to(wide) * embeddings.to(wide), 0.0)
    return terms.sum(1).to(embeddings.dtype)


@part("soft-thinking/entropy", stage="analysis", scope="row", paper=PAPER)
def entropy(probs: Tensor) -> Tensor:
    """H(p) [...] in nats of laws [..., V]."""
    found: Tensor = torch.special.entr(probs).sum(-1)
    return found


@part("soft-thinking/cold-stop", stage="analysis", scope="row", paper=PAPER)
def cold_stop(entropies: Tensor, run: Tensor, *, threshold: float = 0.01, length: int = 256) -> tuple[Tensor, Tensor]:
    """Steps in a row with low entropy [B], this one included, and whether to stop now [B], after `run` [B] before."""
    low = entropies < threshold
    run = torch.where(low, run + 1, 0)
    return run, (run >= length) & (threshold > 0)


def _normalized(masses: Tensor) -> Tensor:
    return masses / masses.sum(-1, keepdim=True)
