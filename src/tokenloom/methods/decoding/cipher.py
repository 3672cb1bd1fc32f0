"""CIPHER: agents talk in expected embeddings instead of tokens (arXiv 2310.06272).

e_t = softmax(z_t / tau) E                     [B, V] x [V, D]: what an agent says at step t and reads as its next input
Read-out: the vocabulary row nearest to e_t, by the distance of vectors of length 1, which is the largest cosine.

Limits: tau -> 0 says tokens: greedy decoding. `cipher/partial` is the paper's ablation, which says a token where the
model is certain (or where it is not). Deviations: none; agents with different models share a vocabulary, and each
listener's E is applied to the speaker's law. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2310.06272"


@part("cipher", stage="choose", scope="row", paper=PAPER)
def expected_embedding(probs: Tensor, embeddings: Tensor) -> Tensor:
    """e [B, D] of laws [B, V] over the embeddings [V, D]; a law that is certain gives its row bit by bit."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    said = probs.to(wide) @ embeddings.to(wide)
    top, ids = probs.max(-1)
    return torch.where((top == 1)[:, None], embeddings[ids].to(wide), said).to(embeddings.dtype)


@part("cipher/nearest", stage="probe", scope="row", paper=PAPER)
def nearest(said: Tensor, directions: Tensor) -> Tensor:
    """Ids [N] of the tokens nearest to `said` [N, D], lengths aside; lowest id among equals.

    `directions` [V, D] are the embeddings, each scaled to length 1; the length of `said` changes nothing.
    """
    return (said.to(directions.dtype) @ directions.T).argmax(-1)


@part("cipher/partial", stage="choose", scope="row", paper=PAPER)
def partial_law(
    probs: Tensor, *, threshold: float = 0.9, tokens_when: Literal["certain", "uncertain"] = "certain"
) -> Tensor:
    """Laws [B, V], all on the most probable token in rows whose largest probability is (not) at the threshold."""
    top, ids = probs.max(-1, keepdim=True)
    certain = top >= threshold
    token = torch.zeros_like(probs).scatter(-1, ids, 1.0)
    return torch.where(certain if tokens_when == "certain" else ~certain, token, probs)
