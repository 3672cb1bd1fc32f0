# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Triton kernels of the fused log-prob: tiles of logits on the tensor cores, reduced or turned into slopes on chip.

Letters: M hidden rows, V vocabulary words, D features; BM, BV, BD their block sizes. `hidden` and `weight`
are row-major with a given number of elements from row to row; offsets are 64-bit because V * D may exceed 2**31.
`inner` and `outer` are the factors within and outside of the soft-cap's tanh; without one, `inner` is the whole factor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transformed(x, inner, outer, CAP: tl.constexpr):
    """Products (with bias) to logits."""
    if CAP:
        return outer * (2.0 * tl.sigmoid(2.0 * inner * x) - 1.0)
    return inner * x


@triton.jit
def logit_tile(
    hidden, weight, bias, rows, words, D, hidden_stride, weight_stride, inner, outer,
    BIAS: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """[BM, BV] logits at `rows` and `words`, which must be in range."""
    at_hidden = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    at_weight = weight + words.to(tl.int64)[:, None] * weight_stride
    x = tl.zeros((BM, BV), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        if EVEN:
            h = tl.load(at_hidden + d[None, :])
            w = tl.load(at_weight + d[None, :])
        else:
            h = tl.load(at_hidden + d[None, :], mask=d[None, :] < D, other=0.0)
            w = tl.load(at_weight + d[None, :], mask=d[None, :] < D, other=0.0)
        x = tl.dot(h.to(DOT), tl.trans(w.to(DOT)), x, input_precision=PRECISION)
    if BIAS:
        x += tl.load(bias + words).to(tl.float32)[None, :]
        # A bias of -inf rules a word out: its p log p is 0, not the product of 0 and -inf. A NaN stays one.
        x = tl.where(x < -1.0e30, -1.0e30, x)
    return transformed(x, inner, outer, CAP)


@triton.jit(do_not_specialize=["M", "V", "split"])
def sums_kernel(
    hidden, weight, bias, m_out, total_out, spread_out, M, V, D, hidden_stride, weight_stride, split, inner, outer,
    ENTROPY: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of BM rows over `split` words; outputs [splits, M], see `chunked` for their meaning."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, V)
    m = tl.full((BM,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    spread = tl.zeros((BM,), dtype=tl.float32)
    for start in range(first, last, BV):
        word = start + tl.arange(0, BV)
        inside = (word < last)[None, :]
        x = logit_tile(
            hidden, weight, bias, rows, tl.minimum(word, V - 1), D, hidden_stride, weight_stride, inner, outer,
            BIAS, CAP, DOT, PRECISION, EVEN, BM, BV, BD,
        )  # fmt: skip
        high = tl.maximum(m, tl.max(tl.where(inside, x, -3.0e38), 1))
        drop = m - high
        keep = tl.exp(drop)
        x = x - high[:, None]
        e = tl.where(inside, tl.exp(x), 0.0)
        if ENTROPY:
            spread = keep * (spread + drop * total) + tl.sum(e * x, 1)
        total = keep * total + tl.sum(e, 1)
        m = high
    out = tl.program_id(1).to(tl.int64) * M + row
    tl.store(m_out + out, m, mask=row < M)
    tl.store(total_out + out, total, mask=row < M)
    if ENTROPY:
        tl.store(spread_out + out, spread, mask=row < M)


@triton.jit(do_not_specialize=["M", "V", "words", "width"])
def slopes_kernel(
    hidden, weight, bias, log_norm, a, b, out, M, V, D, hidden_stride, weight_stride, words, width, inner, outer,
    factor, ENTROPY: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [M, width] = d loss / d product at the words from `words` on: p (a + b log p) times the form's slope."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    x = logit_tile(
        hidden, weight, bias, rows, tl.minimum(words + column, V - 1), D, hidden_stride, weight_stride, inner, outer,
        BIAS, CAP, DOT, PRECISION, EVEN, BM, BV, BD,
    )  # fmt: skip
    logprobs = x - tl.load(log_norm + rows)[:, None]
    slope = tl.load(a + rows)[:, None]
    if ENTROPY:
        slope = slope + tl.load(b + rows)[:, None] * logprobs
    slope = slope * tl.exp(logprobs) * factor
    if CAP:
        slope = slope * (1.0 - (x / outer) * (x / outer))
    start = out + (tl.program_id(0) * BM).to(tl.int64) * width
    place = start + (tl.arange(0, BM)[:, None] * width + column[None, :])
    tl.store(place, slope.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < width)[None, :])


@triton.jit
def chosen_kernel(
    hidden, weight, bias, rows, tokens, out, D, hidden_stride, weight_stride, inner, outer,
    BIAS: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [N]: one logit for every pair of a row and a token."""
    pair = tl.program_id(0)
    token = tl.load(tokens + pair)
    at_hidden = hidden + tl.load(rows + pair) * hidden_stride
    at_weight = weight + token * weight_stride
    x = tl.zeros((BD,), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        h = tl.load(at_hidden + d, mask=d < D, other=0.0).to(DOT).to(tl.float32)
        w = tl.load(at_weight + d, mask=d < D, other=0.0).to(DOT).to(tl.float32)
        x += h * w
    product = tl.sum(x, 0)
    if BIAS:
        product += tl.load(bias + token).to(tl.float32)
    tl.store(out + pair, transformed(product, inner, outer, CAP))


@triton.jit
def probe_kernel(out):
    """The smallest kernel there is, to see whether one can be built."""
    tl.store(out, 1.0)
