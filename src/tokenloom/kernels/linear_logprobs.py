"""Log-probs and entropies straight from hidden states, without the logit matrix.

logits   = cap(scale * (hidden @ weight.T + bias)) / temperature,   cap(x) = c tanh(x / c) or x
logprob  = logits[target] - logsumexp(logits)
entropy  = logsumexp(logits) - sum_v p_v logits_v                   (nats)

Rows are taken in chunks, so memory is O(chunk x V) instead of O(N x V); the backward recomputes a
chunk's logits instead of keeping them. With p the softmax and H the entropy,

d logprob / d logits_v = [v = target] - p_v
d entropy / d logits_v = -p_v (log p_v + H)

On a CPU the passes over [chunk, V] cost more than the exponentials in them: buffers are reused
across chunks and changed in place, scale and temperature go into the hidden rows, row gradients
multiply the [chunk, D] products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Logits alive at once when no chunk is given: 64 MiB of float32 in each of one to three buffers."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    need_entropy: bool = False,
    chunk: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and, on request, the entropy of each row's distribution.

    `hidden` [N, D], `weight` [V, D], `targets` [N] int64, `bias` [V]; `scale` multiplies the
    logits, `softcap` bounds them, `temperature` divides the result. Both outputs are [N], float32
    (float64 when an input is). Under autocast, or with weights of 16 bits, the matrix products run in that
    format and everything else in float32. Gradients reach `hidden`, `weight` and `bias`, once
    (no double backward). `chunk` rows are handled at once; 0 chooses by the size of the vocabulary.

    Raises:
        ValueError: when shapes disagree or `temperature` is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive; greedy decoding is scored at 1")
    if chunk < 1:
        chunk = max(16, CHUNK_ELEMENTS // weight.shape[0])
    shape = _Shape(float(scale), softcap, float(temperature), chunk, _product_dtype(hidden, weight))
    apply: Callable[..., tuple[Tensor, Tensor]] = _LinearLogprobs.apply  # torch leaves it without a type
    logprobs, entropies = apply(hidden, weight, bias, targets, shape, need_entropy)
    return logprobs, entropies if need_entropy else None


class _Shape(NamedTuple):
    """How hidden rows become logits, and how many at once."""

    scale: float
    softcap: float | None
    temperature: float
    chunk: int
    product: torch.dtype

    @property
    def math(self) -> torch.dtype:
        """Format of everything but the matrix products."""
        return torch.float64 if self.product == torch.float64 else torch.float32

    @property
    def factor(self) -> float:
        """What multiplies the product: all of scale and temperature when no soft-cap stands between them."""
        return self.scale / self.temperature if self.softcap is None else self.scale


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _Chunks:
    """Recomputes the logits of any slice of rows into buffers that all slices share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> None:
        self.shape = shape
        self.hidden, self.weight = hidden.to(shape.product), weight.to(shape.product)
        self.bias = None if bias is None else bias.to(shape.math) * shape.factor
        rows = min(shape.chunk, hidden.shape[0])
        self._buffers = [torch.empty(rows, weight.shape[0], dtype=shape.math, device=hidden.device)]

    def buffer(self, index: int, like: Tensor) -> Tensor:
        """Scratch space `index` (1, 2, ...) in the shape of `like`."""
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty_like(self._buffers[0]))
        return self._buffers[index][: like.shape[0]]

    def logits(self, rows: slice) -> Tensor:
        """[n, V] in the first buffer, before division by the temperature if there is a soft-cap."""
        shape, hidden = self.shape, self.hidden[rows]
        out = self._buffers[0][: hidden.shape[0]]
        if shape.product == shape.math:
            hidden = hidden if shape.factor == 1.0 else hidden * shape.factor
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            # 16-bit rows are not scaled before the product: that would round them a second time.
            out.copy_(torch.mm(hidden, self.weight.t()))
            if shape.factor != 1.0:
                out.mul_(shape.factor)
        if self.bias is not None:
            out.add_(self.bias)
        if shape.softcap is not None:
            out.div_(shape.softcap).tanh_().mul_(shape.softcap)
        return out


def _slices(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]


class _LinearLogprobs(torch.autograd.Function):
    """See the module's docstring. Entropies are an empty tensor when they are not asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: _Shape,
        need_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        logprobs = torch.empty(n, dtype=shape.math, device=hidden.device)
        log_norm = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if need_entropy else logprobs.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, shape)
            for rows in _slices(n, shape.chunk):
                x = chunks.logits(rows)
                if shape.softcap is not None and shape.temperature != 1.0:
                    x.div_(shape.temperature)
                top = x.amax(-1, keepdim=True)
                chosen = x.gather(-1, targets[rows, None]) - top
                x.sub_(top)
                if need_entropy:
                    e = torch.exp(x, out=chunks.buffer(1, x))
                    total = e.sum(-1)
                    entropies[rows] = total.log() - x.mul_(e).sum(-1) / total
                else:
                    total = x.exp_().sum(-1)
                logprobs[rows] = chosen[:, 0] - total.log()
                log_norm[rows] = top[:, 0] + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropies)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, log_norm, entropies = ctx.saved_tensors
        if entropies.numel() == 0:
            grad_entropies = None
        if grad_logprobs is None and grad_entropies is None:
            return None, None, None, None, None, None
        # Tokens that the clip or the mask silenced need no logits: only rows with a gradient are recomputed.
        g = torch.zeros_like(log_norm) if grad_logprobs is None else grad_logprobs
        live = g != 0 if grad_entropies is None else (g != 0) | (grad_entropies != 0)
        index = live.nonzero()[:, 0]
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Gradients(ctx.shape, hidden[index], weight, bias, ctx.needs_input_grad)
            for rows in _slices(len(index), ctx.shape.chunk):
                at = index[rows]
                h = None if grad_entropies is None else entropies[at]
                grad_h = None if grad_entropies is None else grad_entropies[at]
                grads.add(rows, targets[at], g[at], log_norm[at], grad_h, h)
            return (*grads.result(hidden, index), None, None, None)


class _Gradients:
    """Accumulates the three gradients chunk by chunk; the weight's in one float32 buffer."""

    def __init__(
        self, shape: _Shape, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self.shape = shape
        self.chunks = _Chunks(hidden, weight, bias, shape)
        self.hidden = torch.zeros_like(hidden, dtype=shape.math) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=shape.math) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=shape.math) if bias is not None and needed[2] else None
        self.formats = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def add(
        self,
        rows: slice,
        targets: Tensor,
        g: Tensor,
        log_norm: Tensor,
        grad_h: Tensor | None,
        h: Tensor | None,
    ) -> None:
        """Add the share of the rows `rows`; everything else is [n], `grad_h` and `h` for the entropy."""
        shape, x = self.shape, self.chunks.logits(rows)
        slope = None
        if shape.softcap is not None:
            slope = torch.div(x, shape.softcap, out=self.chunks.buffer(2, x)).square_().neg_().add_(1.0)
            if shape.temperature != 1.0:
                x.div_(shape.temperature)
        x.sub_(log_norm[:, None])
        # From here x becomes d(-objective)/d(logits), up to the row factor `outer`.
        if grad_h is None or h is None:
            outer = -g
            x.exp_().scatter_add_(-1, targets[:, None], torch.full_like(g[:, None], -1.0))
        else:
            outer = torch.full_like(g, -1.0)
            p = torch.exp(x, out=self.chunks.buffer(1, x))
            x.mul_(grad_h[:, None]).add_((grad_h * h + g)[:, None]).mul_(p)
            x.scatter_add_(-1, targets[:, None], -g[:, None])
        if slope is not None:
            x.mul_(slope)
            outer = outer / shape.temperature
        outer = (outer * shape.factor)[:, None]
        product = x.to(shape.product)
        if self.hidden is not None:
            torch.mul(torch.mm(product, self.chunks.weight), outer, out=self.hidden[rows])
        if self.weight is not None:
            scaled = (self.chunks.hidden[rows] * outer).to(shape.product)
            if shape.product == shape.math:
                self.weight.addmm_(product.t(), scaled)
            else:
                self.weight.add_(torch.mm(product.t(), scaled))
        if self.bias is not None:
            self.bias.addmv_(x.t(), outer[:, 0])

    def result(self, hidden: Tensor, index: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in their tensors' formats; rows without a gradient get exact zeros."""
        whole = None
        if self.hidden is not None:
            whole = torch.zeros_like(hidden).index_copy_(0, index, self.hidden.to(self.formats[0]))
        weight = None if self.weight is None else self.weight.to(self.formats[1])
        bias = None if self.bias is None else self.bias.to(self.formats[2])
        return whole, weight, bias
