"""From logits to tokens: temperature, top-k, top-p, one uniform number per draw.

The law of a token is `softmax(logits / temperature)`, cut to the `top_k` most probable tokens and
then to the smallest set of most probable tokens that holds at least `top_p` of what is left,
renormalized. The token is the inverse of the law's distribution function at a uniform number
(tokens in id order), so the law is exact and a draw is a function of (logits, u) alone.

A vocabulary of 50 000 makes every pass over the logits count: one exponential pass serves the
normalizer, the draw and the log-prob; the inverse is looked up in two levels (blocks of tokens,
then tokens of one block), which needs no cumulative sum over the vocabulary and no sort.
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
    masses = Sampler(sampling).masses(logits).flatten(1)[:, : logits.shape[-1]]
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
    """Draws tokens under `sampling`; keeps one [B, V] buffer between calls."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._buffer = torch.empty(0)

    def draw(self, logits: Tensor, uniforms: Tensor, unshaped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B] int64 and their log-probs [B] (float32, or float64 for float64 logits).

        `logits` [B, V] are what the law is made of and `uniforms` [B] lie in [0, 1). With
        `sampling.processed` the log-probs are those of the law; otherwise those of the full
        softmax at the sampling temperature (greedy: temperature 1) of `unshaped` [B, V], by
        default `logits`.
        """
        s = self.sampling
        if s.temperature == 0:
            return self._greedy(logits, logits if unshaped is None else unshaped)
        masses = self.masses(logits)
        blocks = _wide(masses.sum(-1))
        total = blocks.sum(-1)
        if s.top_k > 0 or s.top_p < 1:
            truncate_(masses.flatten(1)[:, : logits.shape[-1]], s.top_k, s.top_p)
            blocks = _wide(masses.sum(-1))
        tokens, mass = _invert(masses, blocks, uniforms)
        tokens.clamp_(max=logits.shape[-1] - 1)  # for logits that are not numbers: the log-prob tells
        if s.processed:
            return tokens, (mass.log() - blocks.sum(-1).log()).to(masses.dtype)
        if unshaped is None:
            return tokens, (mass.log() - total.log()).to(masses.dtype)
        return tokens, self.logprobs(unshaped, tokens, s.temperature)

    def masses(self, logits: Tensor) -> Tensor:
        """`exp(logits / temperature - max)` in blocks, [B, blocks, block]; overwritten by the next call."""
        return self._exp(logits, self.sampling.temperature)

    def logprobs(self, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Log-prob [B] of `tokens` [B] under the full softmax of `logits` [B, V] at `temperature`."""
        masses = self._exp(logits, temperature).flatten(1)
        total = _wide(masses).sum(-1)
        # From the logits: the mass of an improbable token may have underflowed.
        taken, top = logits.gather(1, tokens[:, None])[:, 0], logits.amax(-1)
        return ((_wide(taken) - _wide(top)) / temperature - total.log()).to(masses.dtype)

    def _greedy(self, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        tokens = logits.argmax(-1)
        if self.sampling.processed:
            return tokens, torch.zeros_like(tokens, dtype=_working(logits))
        return tokens, self.logprobs(reference, tokens, 1.0)

    def _exp(self, logits: Tensor, temperature: float) -> Tensor:
        b, vocab = logits.shape
        width = -(-vocab // _BLOCK) * _BLOCK
        dtype = _working(logits)
        kept = self._buffer
        if kept.dtype != dtype or kept.device != logits.device or kept.shape[0] < b or kept.shape[-1] != width:
            # Zeros: the columns beyond V must not weigh anything.
            self._buffer = torch.zeros(b, width, dtype=dtype, device=logits.device)
        whole = self._buffer[:b]
        x = whole[:, :vocab]
        x.copy_(logits)
        x.sub_(x.amax(-1, keepdim=True))
        if temperature != 1:
            x.div_(temperature)
        x.exp_()
        if width > vocab:
            whole[:, vocab:].zero_()
        return whole.view(b, -1, _BLOCK)


def _invert(masses: Tensor, blocks: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] where the cumulative mass passes `uniforms`, and their masses [B] (wide)."""
    rows = torch.arange(len(masses), device=masses.device)
    cumulative = blocks.cumsum(-1)
    target = uniforms.to(blocks.dtype) * cumulative[:, -1]
    block = _first_above(cumulative, target)
    rest = target - (cumulative[rows, block] - blocks[rows, block])
    inner = _wide(masses[rows, block]).cumsum(-1)
    # The block's own sum was rounded on its way: measure the remainder on the scale of `inner`.
    rest = rest / blocks[rows, block] * inner[:, -1]
    place = _first_above(inner, rest)
    return block * masses.shape[-1] + place, _wide(masses[rows, block, place])


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
