"""Green-list watermark: a keyed share of the vocabulary is favored at each step (arXiv 2301.10226).

Each step's green set has floor(gamma V) tokens, chosen by a generator whose seed is the key times the tokens before it;
z'_v = z_v + delta for green v. A text with G green of n tokens has
z = (G - gamma n) / sqrt(n gamma (1 - gamma)),   p-value = P(Binomial(n, gamma) >= G) without a watermark.
The law of the text is distorted (contrast `distortion-free-watermark`). Limits: delta = 0 leaves the law; delta =
infinity allows green tokens only, in rows where one is possible. With one token of context the sets equal those of
transformers' `WatermarkLogitsProcessor` ("lefthash") on the CPU. Deviations: the p-value is the exact binomial tail,
where the normal one of z is too small for short texts; gamma stands for the share that floor(gamma V) / V really is;
tokens that repeat within the same context are counted once, for they are no independent evidence. Fidelity: code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.catalog import part

# Folds several tokens of context into one seed; a prime, so that their order matters.
_FOLD = 1_000_003
_SEEDS = 2**64 - 1


@dataclass(frozen=True)
class Detection:
    """How many tokens were counted and how many of them were green, with the evidence of that."""

    tokens: int
    green: int
    z: float
    p_value: float
    """How probable that many green tokens are in a text without the watermark."""


@part("green-list-watermark", stage="shape", scope="row", paper="arXiv:2301.10226")
def green_list_watermark(scores: Tensor, green: Tensor, *, delta: float = 2.0) -> Tensor:
    """Scores [B, V] with `delta` added where `green` [B, V] bool.

    Raises:
        ValueError: for a negative delta.
    """
    if not delta >= 0:
        raise ValueError(f"green-list-watermark: delta raises green tokens and must be 0 or more, got {delta}")
    if delta < math.inf:
        return torch.where(green, scores + delta, scores)
    alone = scores.masked_fill(~green, -torch.inf)
    return torch.where((alone > -torch.inf).any(-1, keepdim=True), alone, scores)


@part("green-list-watermark/detect", stage="analysis", scope="row", paper="arXiv:2301.10226")
def detect(
    ids: Sequence[int], vocab: int, *, gamma: float = 0.25, key: int = 15485863, context: int = 1, distinct: bool = True
) -> Detection:
    """The evidence that `ids` carry the watermark; the first `context` of them are read but not counted.

    Hand in the last tokens of the prompt too if they are known. `distinct` counts a token once per context.

    Raises:
        ValueError: when there is no token to count, for a token outside the vocabulary, or for gamma or context that
            cannot be.
    """
    beyond = [int(token) for token in ids if not 0 <= token < vocab]
    if beyond:
        raise ValueError(
            f"green-list-watermark: the text has token {beyond[0]} and the vocabulary {vocab} tokens; give the width "
            "of the model's scores, which may be more than the tokenizer has"
        )
    pairs = [(tuple(ids[i - context : i]), int(ids[i])) for i in range(context, len(ids))]
    pairs = list(dict.fromkeys(pairs)) if distinct else pairs
    if not pairs:
        raise ValueError(
            f"green-list-watermark: a text of {len(ids)} tokens has none behind a context of {context}; give more text"
        )
    green = 0
    for before, token in pairs:
        ids_of_green = green_ids(before, vocab, gamma=gamma, key=key, context=context)
        green += bool((ids_of_green == token).any())
    share = math.floor(gamma * vocab) / vocab
    return Detection(
        tokens=len(pairs), green=green, z=z_score(green, len(pairs), share), p_value=_tail(green, len(pairs), share)
    )


def z_score(green: int, tokens: int, gamma: float) -> float:
    """Standard deviations by which the number of green tokens exceeds its expectation."""
    return (green - gamma * tokens) / math.sqrt(tokens * gamma * (1 - gamma))


def green_tokens(before: Sequence[int], vocab: int, *, gamma: float, key: int, context: int = 1) -> frozenset[int]:
    """The green tokens after the last `context` tokens of `before`.

    Raises:
        ValueError: for gamma outside (0, 1) or one that leaves no green token, or fewer tokens than `context`.
    """
    return frozenset(green_ids(before, vocab, gamma=gamma, key=key, context=context).tolist())


def green_ids(before: Sequence[int], vocab: int, *, gamma: float, key: int, context: int = 1) -> Tensor:
    """The same as ids [floor(gamma V)] on the CPU, without order.

    Raises:
        ValueError: as `green_tokens`.
    """
    size = math.floor(gamma * vocab)
    if not 0 < gamma < 1 or size < 1:
        raise ValueError(
            f"green-list-watermark: gamma is the green share in (0, 1) of {vocab} tokens, one at least; got {gamma}"
        )
    if context < 1 or len(before) < context:
        raise ValueError(
            f"green-list-watermark: {context} tokens of context are asked for, 1 at least, and {len(before)} are there"
        )
    folded = 0
    for token in before[len(before) - context :]:
        folded = folded * _FOLD + int(token)
    generator = torch.Generator().manual_seed(key * folded % _SEEDS)
    return torch.randperm(vocab, generator=generator)[:size]


def _tail(green: int, tokens: int, gamma: float) -> float:
    """P(Binomial(tokens, gamma) >= green)."""
    k = torch.arange(green, tokens + 1, dtype=torch.float64)
    n = torch.tensor(float(tokens), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, float((ways + k * math.log(gamma) + (n - k) * math.log1p(-gamma)).logsumexp(0).exp()))
