"""Log-probs, entropies and most likely tokens straight from hidden states, without the logit matrix.

logits   = cap(scale * (hidden @ weight.T + bias)) / temperature,   cap(x) = c tanh(x / c) or x
logprob  = logits[row, target] - logsumexp(logits[row])
entropy  = logsumexp(logits) - sum_v p_v logits_v                   (nats)

The logits are computed in tiles that fit into a cache, and again in the backward. Memory is a few tiles and, for
16-bit weights, the gradients of one vocabulary block's logits and the float32 sum of the hidden states' gradient,
instead of O(M x V). A row of hidden states costs one log-sum-exp however many targets it has, and none when no
target names it or, in the backward, when no gradient reaches it. With p the softmax and H the entropy,

d logprob / d logits_v = [v = target] - p_v,        d entropy / d logits_v = -p_v (log p_v + H)

Deviations from an autograd of the definition: none in exact arithmetic. The target's own share, 1 - p, is
computed as -expm1(log p), which does not cancel for tokens that the policy is sure of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenloom.kernels import vocab_parallel
from tokenloom.kernels.accumulation import accumulator
from tokenloom.kernels.backend import Call, engine
from tokenloom.kernels.logit_form import LogitForm
from tokenloom.kernels.pairs import Pairs, live_rows
from tokenloom.kernels.products import narrowed


class TopTokens(NamedTuple):
    """The k most likely tokens of each row, descending: `logprobs` [N, k] with gradient, `tokens` [N, k] int64."""

    logprobs: Tensor
    tokens: Tensor


class LinearLogprobs(NamedTuple):
    """`logprobs` [N]; `entropies` [N] in nats and `top`, or None when not asked for."""

    logprobs: Tensor
    entropies: Tensor | None
    top: TopTokens | None


def linear_logprobs(
    hidden: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    need_entropy: bool = False,
    top_k: int = 0,
    *,
    chunk: int = 0,
    group: Any = None,
) -> LinearLogprobs:
    """Log-prob of each target and, on request, entropy and top tokens of the distribution it was drawn from.

    `hidden` [M, D]; `rows` [N] int64, the hidden row that predicts each target (None: target n is of row n);
    `targets` [N] int64; `weight` [V, D]; `bias` [V]. `scale` multiplies the logits, `softcap` bounds them,
    `temperature` divides the result. Outputs are float32 (float64 when an input is). Under autocast, or
    with weights of 16 bits, the matrix products run in that format and everything else in float32.
    Gradients reach `hidden`, `weight` and `bias`, once (no double backward). `chunk` is the number of rows
    of a tile; 0 chooses.

    With a `torch.distributed` `group`, `weight` and `bias` are this process's rows of the vocabulary (blocks in
    the order of the ranks) and `targets` ids of the whole; all processes must pass the same `hidden`, `rows` and
    `targets` and use the outputs in the same way. The gradient of `hidden` is then the whole one on each.

    Raises:
        ValueError: when shapes disagree, an id or row is out of range, `temperature` or `softcap` is not
            positive, or `top_k` is not between 0 and V.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [M, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    n = hidden.shape[:1] if rows is None else rows.shape
    if targets.ndim != 1 or targets.shape != n:
        raise ValueError(f"targets must be [{n[0] if n else 1}], one for each of rows, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one for each row of weight, got {tuple(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive; greedy decoding is scored at 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be positive; write None for logits without a bound")
    offset, vocabulary = (0, len(weight)) if group is None else vocab_parallel.shard(len(weight), group, weight.device)
    _check_range("targets", targets, vocabulary, "leave ignored tokens out, or give them any valid id")
    if rows is not None:
        _check_range("rows", rows, len(hidden), "a row is an index into hidden")
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k is {top_k}, must be between 0 and the {vocabulary} tokens of the vocabulary")
    form = LogitForm(float(scale), softcap, float(temperature), _product_dtype(hidden, weight))
    call = Call(form, need_entropy, top_k, chunk, group, offset, vocabulary)
    apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _LinearLogprobs.apply  # torch leaves it untyped
    logprobs, entropies, top, tokens = apply(hidden, rows, targets, weight, bias, call)
    return LinearLogprobs(logprobs, entropies if need_entropy else None, TopTokens(top, tokens) if top_k else None)


def _check_range(name: str, ids: Tensor, size: int, remedy: str) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {ids.dtype}")
    if ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got {low if low < 0 else high}: {remedy}")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _LinearLogprobs(torch.autograd.Function):
    """See the module's docstring. What was not asked for is an empty tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: Tensor | None,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        used, rows = _compact(rows, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = engine(call, hidden if used is None else hidden[used], weight, bias)
            sums = logits.sums(rows, targets - call.offset, need_entropy=call.need_entropy, top_k=call.top_k)
            if call.group is not None:
                sums = vocab_parallel.joined(sums, call.offset, call.group)
        log_total = sums.total.log()
        log_norm = sums.m + log_total
        logprobs = sums.chosen - log_norm[rows]
        # The spread is a sum of products of the largest logit's distance: no cancellation for sharp rows.
        entropies = log_total - sums.spread / sums.total if call.need_entropy else log_total[:0]
        tokens = rows[:0] if sums.top is None else sums.top[1][rows]
        top = log_total[:0] if sums.top is None else (sums.top[0] - log_norm[:, None])[rows]
        ctx.save_for_backward(hidden, weight, bias, used, rows, targets, log_norm, logprobs, entropies, top, tokens)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tokens)
        return logprobs, entropies[rows] if call.need_entropy else log_total[:0], top, tokens

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None, grad_top: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, used, rows, targets, log_norm, logprobs, entropies, top, tokens = ctx.saved_tensors
        call: Call = ctx.call
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], bias is not None and ctx.needs_input_grad[4])
        if not any(needed):
            return (None,) * 6
        pairs = Pairs(rows, targets, logprobs, _or_zeros(grad_logprobs, logprobs))
        if grad_top is not None and call.top_k:
            more = (x.reshape(-1) for x in (rows[:, None].expand_as(tokens), tokens, top, grad_top))
            pairs = pairs.joined(Pairs(*more))
        of_entropy = None
        if grad_entropies is not None and call.need_entropy:
            of_entropy = torch.zeros_like(log_norm).index_add_(0, rows, grad_entropies)
        index, of, pairs = live_rows(pairs, of_entropy, log_norm, entropies, call.vocabulary)
        whole = len(index) == len(hidden)
        at = index if used is None else used[index]
        with torch.autocast(hidden.device.type, enabled=False):
            rows, tokens, values = pairs.rows, pairs.tokens - call.offset, pairs.of_products(of, call.form)
            live = hidden if whole else hidden[at]
            into = accumulator(weight) if needed[1] else None
            grads = engine(call, live, weight, bias).gradients(of, rows, tokens, values, needed, into)
            of_hidden = grads[0]
            if of_hidden is not None and not whole:
                of_hidden = of_hidden.new_zeros(hidden.shape).index_copy_(0, at, of_hidden)
            if of_hidden is not None and call.group is not None:
                dist.all_reduce(of_hidden, group=call.group)
        if of_hidden is not None:
            of_hidden = narrowed(of_hidden, hidden.dtype)
        return of_hidden, None, None, grads[1], grads[2], None


def _compact(rows: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
    """The hidden rows that any target names (None: all), and each target's place among them."""
    if rows is None:
        return None, torch.arange(len(hidden), device=hidden.device)
    named = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device).index_fill_(0, rows, True)
    used = named.nonzero()[:, 0]
    if len(used) == len(hidden):
        return None, rows
    return used, (torch.cumsum(named, 0) - 1)[rows]


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
