"""Distortion-free watermark: tokens chosen by a secret sequence, found again by alignment (arXiv 2307.15593).

EXP: a key element ξ ∈ U[0,1]^V chooses argmin_v -log ξ_v / p_v.          ITS: a key element u ∈ U[0,1] chooses the
first token, in the order π of the key, at which the cumulative law exceeds u. Over random keys both draw from p.
Costs of token y under a key element: EXP log(1 - ξ_y); ITS |u - rank_π(y) / V|; watermarked text has low costs.
Statistic: the least cost of aligning k successive tokens with k successive key elements (cyclic), over all starts
    block   Σ of the k costs
    edit    A[i,j] = min(A[i-1,j] + γ, A[i,j-1] + γ, A[i-1,j-1] + cost), A[0,j] = jγ, A[i,0] = iγ: robust to
            tokens deleted or inserted
p-value: (1 + #{statistic of a random key <= ours}) / (1 + number of random keys).

Letters: T keys, m tokens, n key elements, k tokens of a block, V vocabulary. Deviations: ξ is clipped off 0, and off 1
in costs; it is wanted in float64, as float32's steps of 6e-8 below 1 leave out all tokens below some 1e-7, which hold
4e-4 of a SmolLM2's mass; the p-value has the two ones that make it valid; ITS never gives a token of mass 0. Fidelity:
code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part

_PAPER = "arXiv:2307.15593"
_LEAST, _MOST = 1e-30, 1 - 1e-7
_CELLS = 1 << 18
"""Cells of an anti-diagonal over all keys of a chunk: what stays in a core's cache."""


@part("distortion-free-watermark", stage="choose", scope="row", paper=_PAPER)
def exp_choice(probs: Tensor, xi: Tensor) -> Tensor:
    """EXP's tokens [B] for laws [B, V] and key elements [B, V] in [0, 1)."""
    wait = -xi.double().clamp(min=_LEAST).log() / probs.double()
    return wait.masked_fill(probs <= 0, torch.inf).argmin(-1)


@part("distortion-free-watermark/its", stage="choose", scope="row", paper=_PAPER)
def its_choice(probs: Tensor, u: Tensor, permutation: Tensor) -> Tensor:
    """ITS's tokens [B] for laws [B, V], key elements [B] in [0, 1) and the order `permutation` [V] of the tokens."""
    ordered = probs.double()[:, permutation]
    cumulative = ordered.cumsum(-1)
    at = torch.searchsorted(cumulative, u.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may carry u to the very end: never a token without mass.
    last = torch.where(ordered > 0, torch.arange(probs.shape[1], device=probs.device), 0).amax(-1)
    return permutation[torch.minimum(at, last)]


def exp_costs(xi: Tensor) -> Tensor:
    """Costs log(1 - ξ) of tokens under key elements that give them `xi`, of any shape."""
    return torch.log1p(-xi.clamp(max=_MOST))


def its_costs(u: Tensor, places: Tensor) -> Tensor:
    """Costs [T, m, n] of tokens whose place in the key's order, over V, is `places` [T, m], under u [T, n]."""
    return (u[:, None] - places[:, :, None]).abs()


@part("distortion-free-watermark/block", stage="analysis", scope="row", paper=_PAPER)
def block_statistic(costs: Tensor, *, block: int | None = None) -> Tensor:
    """[T]: the least cost of a block of tokens against the key elements in step; `costs` [T, m, n].

    Raises:
        ValueError: for a block that is longer than the text.
    """
    k = _block(costs, block)
    t, m, n = costs.shape
    wide = _unrolled(costs, m)
    # Diagonal j: token i against element j + i.
    steps = wide.as_strided((t, n, m), (wide.stride(0), 1, wide.stride(1) + 1))
    sums = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    return (sums[:, :, k:] - sums[:, :, : m - k + 1]).amin((1, 2))


@part("distortion-free-watermark/edit", stage="analysis", scope="row", paper=_PAPER)
def edit_statistic(costs: Tensor, *, gamma: float = 0.0, block: int | None = None) -> Tensor:
    """[T]: the least edit cost of a block of tokens against as many key elements; `costs` [T, m, n].

    Raises:
        ValueError: for a block that is longer than the text.
    """
    k = _block(costs, block)
    _, m, n = costs.shape
    chunk = max(1, _CELLS // (k * n))
    best = [
        torch.stack([_edit(part[:, i : i + k], gamma) for i in range(m - k + 1)]).amin(0)
        for part in torch.split(costs, chunk)
    ]
    return torch.cat(best)


@part("distortion-free-watermark/p-value", stage="analysis", scope="row", paper=_PAPER)
def p_value(observed: float, reference: Tensor) -> float:
    """How often a random key fits at least as well: `reference` [T] holds the statistics of T random keys."""
    return (1 + int((reference <= observed).sum())) / (1 + len(reference))


def _edit(costs: Tensor, gamma: float) -> Tensor:
    """[T]: the least edit cost of all k tokens of `costs` [T, k, n] against k elements, over the n starts.

    All starts and keys go through one table of anti-diagonals d = i + j; in `rows` [T, k + 1, n] stands A[i, d - i].
    """
    t, k, n = costs.shape
    wide = _unrolled(costs, k)
    before, last, new = (costs.new_zeros(t, k + 1, n) for _ in range(3))
    scratch = costs.new_empty(t, k, n)
    last[:, :2] = gamma
    for d in range(2, 2 * k + 1):
        low, high = max(1, d - k), min(k, d - 1)
        cells = new[:, low : high + 1]
        torch.minimum(last[:, low - 1 : high], last[:, low : high + 1], out=cells)
        if gamma:
            cells += gamma
        # Token i - 1 against element start + j - 1, one row further in each token, one column back.
        met = wide.as_strided(
            (t, high - low + 1, n),
            (wide.stride(0), wide.stride(1) - 1, 1),
            (low - 1) * (wide.stride(1) - 1) + d - 2,
        )
        matched = torch.add(before[:, low - 1 : high], met, out=scratch[:, : high - low + 1])
        torch.minimum(cells, matched, out=cells)
        new[:, 0] = d * gamma
        if d <= k:
            new[:, d] = d * gamma
        before, last, new = last, new, before
    return last[:, k].amin(-1)


def _unrolled(costs: Tensor, k: int) -> Tensor:
    """`costs` [T, k, n] with the cyclic key written out: [T, k, n + k - 1], contiguous."""
    n = costs.shape[2]
    times = -(-(n + k - 1) // n)
    return costs.repeat(1, 1, times)[:, :, : n + k - 1].contiguous()


def _block(costs: Tensor, block: int | None) -> int:
    m = costs.shape[1]
    k = m if block is None else block
    if not 1 <= k <= m:
        raise ValueError(f"distortion-free-watermark: a block of {k} tokens does not fit into a text of {m}")
    return k
