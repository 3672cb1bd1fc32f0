"""From logits to tokens: temperature, top-k, top-p, one uniform number per draw.

The law of a token is `softmax(logits / temperature)`, cut to the `top_k` most probable tokens and
then to the smallest set of most probable tokens that holds at least `top_p` of what is left,
renormalized. The token is the inverse of the law's distribution function at a uniform number
(tokens in id order), so the law is exact and a draw is a function of (logits, u) alone.

A vocabulary of 50 000 makes every pass over the logits count: one softmax serves the draw and the
log-prob; its inverse is looked up in two levels (blocks of tokens, then tokens of one block), which
needs no cumulative sum over the vocabulary and no sort.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.batch import Sampling

_BLOCK = 256


def check_sampling(sampling: Sampling) -> None:
    """Refuse impossible parameters.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(f"temperature is {sampling.temperature}, must be finite and >= 0 (0 means greedy)")
    if sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}, must be >= 0 (0 keeps the whole vocabulary)")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, must lie in (0, 1] (1 keeps the whole vocabulary)")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens}, must be >= 1")
    if isinstance(sampling.stop, str) or "" in sampling.stop:
        raise ValueError(f"stop is {sampling.stop!r}, must be a tuple of non-empty strings, such as ('\\n',)")


def law(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] of the token that `Sampler` draws from `logits` [B, V]."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    masses = _softmax(logits, sampling.temperature)
    truncate_(masses, sampling.top_k, sampling.top_p)
    return masses / masses.sum(-1, keepdim=True)


def truncate_(masses: Tensor, top_k: int, top_p: float) -> None:
    """Set to zero, in place, the masses [B, V] >= 0 that top-k and then top-p cut off.

    top-k keeps every token as heavy as the k-th (so ties may keep more than k: no order among
    equals is invented). top-p keeps the fewest tokens whose mass reaches `top_p` of the total after
    top-k, the one that crosses included; among equals at the edge the lower ids stay.
    """
    vocab = masses.shape[-1]
    if 0 < top_k < vocab:
        least = masses.topk(top_k).values[:, -1:]
        masses.masked_fill_(masses < least, 0.0)
    if top_p < 1:
        total = _wide(masses).sum(-1, keepdim=True)
        # Tokens lighter than (1 - p) total / V weigh less than 1 - p together, so the set to keep lies
        # among the others; half of that bound leaves room for rounding. This avoids sorting V tokens.
        candidates = masses > (0.5 * (1 - top_p) / vocab) * total.to(masses.dtype)
        heaviest = masses.topk(max(1, int(candidates.sum(-1).max()))).values
        kept = (_wide(heaviest).cumsum(-1) < top_p * total).sum(-1, keepdim=True) + 1
        kept.clamp_(max=heaviest.shape[-1])
        edge = heaviest.gather(1, kept - 1)
        equal = masses == edge
        quota = kept - (heaviest > edge).sum(-1, keepdim=True)
        if bool((equal.sum(-1, keepdim=True) > quota).any()):
            equal &= equal.cumsum(-1) <= quota
        masses.masked_fill_(~((masses > edge) | equal), 0.0)


class Sampler:
    """Draws tokens under `sampling`."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def draw(self, logits: Tensor, uniforms: Tensor, unshaped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B] int64 and their log-probs [B] (float32, or float64 for float64 logits).

        `logits` [B, V] are what the law is made of and `uniforms` [B] lie in [0, 1). With
        `sampling.processed` the log-probs are those of the law; otherwise those of the full
        softmax at the sampling temperature (greedy: temperature 1) of `unshaped` [B, V], by
        default `logits`.
        """
        s = self.sampling
        if s.temperature == 0:
            return self._greedy(logits, unshaped)
        masses = _softmax(logits, s.temperature)
        blocks = _block_sums(masses)
        total = blocks.sum(-1)
        if s.top_k > 0 or s.top_p < 1:
            truncate_(masses, s.top_k, s.top_p)
            blocks = _block_sums(masses)
        tokens, mass = _invert(masses, blocks, uniforms)
        if s.processed:
            return tokens, (mass.log() - blocks.sum(-1).log()).to(masses.dtype)
        if unshaped is None:
            return tokens, (mass.log() - total.log()).to(masses.dtype)
        return tokens, _logprobs(unshaped, tokens, s.temperature)

    def _greedy(self, logits: Tensor, unshaped: Tensor | None) -> tuple[Tensor, Tensor]:
        # In float32 first: the search in bfloat16 takes several times as long.
        logits = logits.to(_working(logits))
        tokens = logits.argmax(-1)
        if self.sampling.processed:
            return tokens, torch.zeros_like(tokens, dtype=logits.dtype)
        if unshaped is not None:
            return tokens, _logprobs(unshaped, tokens, 1.0)
        masses = _softmax(logits, 1.0)
        taken = _wide(masses.gather(1, tokens[:, None])[:, 0])
        return tokens, (taken.log() - _block_sums(masses).sum(-1).log()).to(masses.dtype)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    """[B, V] in the working format; its sum is 1 up to rounding, which `_block_sums` takes account of."""
    dtype = _working(logits)
    if temperature != 1:
        logits = logits.to(dtype) / temperature
    return torch.softmax(logits, -1, dtype=dtype)


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-prob [B] of `tokens` [B] under the softmax of `logits` [B, V] at `temperature`."""
    masses = _softmax(logits, temperature)
    # By way of the most probable token: the mass of an improbable one may have underflowed.
    taken, top = logits.gather(1, tokens[:, None])[:, 0], logits.amax(-1)
    highest = _wide(masses.amax(-1)).log() - _block_sums(masses).sum(-1).log()
    return ((_wide(taken) - _wide(top)) / temperature + highest).to(masses.dtype)


def _block_sums(masses: Tensor) -> Tensor:
    """Sums [B, blocks] of `_BLOCK` neighbors each, the last of what is left over; wide."""
    whole = masses.shape[-1] // _BLOCK * _BLOCK
    sums = _wide(masses[:, :whole].view(len(masses), -1, _BLOCK).sum(-1)) if whole else _wide(masses[:, :0])
    if whole == masses.shape[-1]:
        return sums
    return torch.cat((sums, _wide(masses[:, whole:].sum(-1, keepdim=True))), -1)


def _invert(masses: Tensor, blocks: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] where the cumulative mass passes `uniforms`, and their masses [B] (wide)."""
    rows = torch.arange(len(masses), device=masses.device)
    last = masses.shape[-1] - 1
    cumulative = blocks.cumsum(-1)
    target = uniforms.to(blocks.dtype) * cumulative[:, -1]
    block = _first_above(cumulative, target)
    rest = target - (cumulative[rows, block] - blocks[rows, block])
    tokens = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=masses.device)
    inside = masses.gather(1, tokens.clamp(max=last)).masked_fill_(tokens > last, 0.0)
    inner = _wide(inside).cumsum(-1)
    # The block's own sum was rounded on its way: measure the remainder on the scale of `inner`.
    rest = rest / blocks[rows, block] * inner[:, -1]
    place = _first_above(inner, rest)
    # Never beyond the vocabulary, even for logits that are not numbers: the log-prob tells.
    return tokens[rows, place].clamp(max=last), _wide(inside[rows, place])


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the target, and never one without mass of its own."""
    found = torch.searchsorted(cumulative, target[:, None].contiguous(), right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last)[:, 0].clamp_(max=cumulative.shape[-1] - 1)


def _working(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    """float64 where the device has it."""
    return x if x.device.type == "mps" else x.double()
