"""Soft Thinking: while it reasons, a model reads mixtures of tokens instead of tokens (arXiv 2505.15778).

p = softmax(z / tau); keep the top k, then the top p, then p >= min_p max p, then the `max_topk` largest; q is p on
these, renormalized (after each step). Next input: sum_j q_j E[id_j]; the recorded token is the most probable.
Cold stop: the end-of-thinking token is forced at the length-th step in a row with H(p) < threshold, H before the cuts.

Noise of the code (arXiv 2508.03440), before the mixture is sorted again and its first token recorded:
    gumbel     q' = softmax((log q + g) / tau), g standard Gumbel      q'_j is the largest with probability q_j
    dirichlet  q' ~ Dirichlet(alpha q)                                 E q' = q, Var q'_j = q_j (1 - q_j) / (alpha + 1)

Shapes: probs [B, V], q and ids [B, M] with M = max_topk, zeros behind the last kept; they stay zeros under noise.
Entropies in nats. Limits: max_topk = 1 is discrete decoding by the most probable token, with noise too; threshold <= 0
never stops; alpha -> inf is no noise, tau -> 0 draws a token from q. Deviations: none. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2505.15778"
NOISE = "arXiv:2508.03440"


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


@part("soft-thinking/gumbel", stage="choose", scope="row", paper=NOISE)
def gumbel_noise(
    weights: Tensor, ids: Tensor, exponentials: Tensor, *, temperature: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A mixture under Gumbel noise, sorted again: weights and ids [B, M] as of `concept`.

    `exponentials` [B, M] are exponential variates; minus their logs is the noise.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"soft-thinking: the temperature of Gumbel noise must be above 0, got {temperature}")
    noisy = (weights.to(exponentials.dtype).log() - exponentials.log()) / temperature
    return _sorted_again(noisy.softmax(-1).to(weights.dtype), ids)


@part("soft-thinking/dirichlet", stage="choose", scope="row", paper=NOISE)
def dirichlet_noise(
    weights: Tensor, ids: Tensor, gammas: Tensor, exponentials: Tensor, *, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A mixture drawn around q, sorted again: weights and ids [B, M] as of `concept`.

    `gammas` [B, M] are gamma variates of shapes alpha q + 1, `exponentials` [B, M] exponential ones. Gamma variates of
    shape a are those of a + 1 times exp(-e / a), which in logs does not underflow at small a.

    Raises:
        ValueError: for an alpha that is not above 0.
    """
    if not alpha > 0:
        raise ValueError(f"soft-thinking: alpha of Dirichlet noise must be above 0, got {alpha}")
    shapes = alpha * weights.to(gammas.dtype)
    logs = torch.where(weights > 0, gammas.log() - exponentials / shapes, -torch.inf)
    return _sorted_again(logs.softmax(-1).to(weights.dtype), ids)


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


def _sorted_again(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ordered, places = weights.sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(-1, places)


def _normalized(masses: Tensor) -> Tensor:
    return masses / masses.sum(-1, keepdim=True)
