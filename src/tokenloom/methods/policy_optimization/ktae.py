"""KTAE: tokens that tell a prompt's right answers from its wrong ones get credit of their own (arXiv 2505.16826).

Per prompt and token id v, with a right and b wrong rows that contain it, c and d that do not:
F = exp(-2 p) of Fisher's exact two-sided test, 0 where p = 1; IG = information gain of v about being right, in bits
h = asin sqrt(a / (a + c)) - asin sqrt(b / (b + d)); tf = t_r / (t_w + 1e-5) - t_w / (t_r + 1e-5), t_s = 3 q / (q + K)
q = share of v among side s's tokens, K = 1 + N_s / mean(N), N_s = tokens of side s     (BM25 with k1 = 2, b = 1/2)
u_v = top * tanh(x / 2), x = (alpha F + beta IG) / (alpha + beta) * (h + tf);  A'_t = A_t + u of the token   [B, T]
u favors right answers where positive. It is added to A after the std, so |A' - A| <= top. A token that only one side
has gets a huge tf and u near +-top unless F and IG are tiny.

Deviations: p = 1 is tested at 1 - 1e-9 in float64 (the release compares float32 with 1, often misses it and leaves
F = e^-2); the release's 1e-10 in a / (a + c) is left out. A row is right when its verifier reward exceeds `threshold`.
The token that ends a response says nothing about it and gets u = 0: the id `eos`, or by default the last token of rows
that were not cut by length (the release hard-codes one tokenizer's id). Limit: a prompt without right or without
wrong rows keeps A. Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import last_position, where_mask

_CERTAIN = 1 - 1e-9
_TIE = 1 + 1e-7
"""Relative tolerance under which two tables count as equally likely, as in common implementations of the test."""


@part("ktae", stage="credit", scope="group", paper="arXiv:2505.16826")
def ktae(
    advantages: Tensor,
    tokens: Tensor,
    outcomes: Tensor,
    group_ids: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    tf: bool = True,
    top: float = 1.0,
    threshold: float = 0.0,
    eos: int | None = None,
) -> Tensor:
    """Advantages [B, T] plus the value of each token in its group.

    Raises:
        ValueError: for negative weights, or alpha = beta = 0.
    """
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise ValueError(f"ktae weighs two statistics, alpha and beta >= 0 and not both 0; got {alpha} and {beta}")
    seen = mask.any(-1)
    right, wrong = seen & (outcomes > threshold), seen & (outcomes <= threshold)
    values = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    for group in torch.unique(group_ids):
        of_right, of_wrong = (side & (group_ids == group) for side in (right, wrong))
        if bool(of_right.any()) and bool(of_wrong.any()):
            rows = (of_right | of_wrong)[:, None] & mask
            values[rows] = token_values(tokens, of_right, rows, alpha, beta, tf, top)
    ends = last_position(mask) & ~truncated[:, None] if eos is None else tokens == eos
    return where_mask(advantages.detach(), mask) + where_mask(values, mask & ~ends).to(advantages.dtype)


def token_values(
    tokens: Tensor, right: Tensor, where: Tensor, alpha: float, beta: float, tf: bool, top: float
) -> Tensor:
    """u of every token of `where` bool [B, T], row by row: [n] float64. `right` bool [B] are the right rows."""
    _, ids = torch.unique(tokens[where], return_inverse=True)
    number = int(ids.max()) + 1
    of_row = where.nonzero()[:, 0]
    side = right[of_row].long()
    # Presence counts once per row: distinct (row, id) pairs.
    pairs = torch.unique(of_row * number + ids)
    present = _counts(pairs % number, right[pairs // number].long(), number)
    rows = where.any(-1)
    totals = torch.stack([(rows & ~right).sum(), (rows & right).sum()]).double()
    (b, a), (d, c) = present, totals[:, None] - present
    direction = (a / (a + c)).sqrt().asin() - (b / (b + d)).sqrt().asin()
    if tf:
        direction = direction + frequency_term(_counts(ids, side, number))
    strength = (alpha * fisher_strength(a, b, c, d) + beta * information_gain(a, b, c, d)) / (alpha + beta)
    values: Tensor = top * (strength * direction / 2).tanh()
    return values[ids]


def fisher_pvalue(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Two-sided p-value of 2x2 tables [V] with the same total: how likely a table at most as likely is.

    >>> fisher_pvalue(*torch.tensor([[3.0], [1.0], [1.0], [3.0]]))
    tensor([0.4857], dtype=torch.float64)
    """
    a, b, c, d = (x.double()[:, None] for x in (a, b, c, d))
    holders, right, total = a + b, a + c, a + b + c + d
    k = torch.arange(int(total.max()) + 1, device=a.device)[None].double()
    possible = (k >= holders + right - total) & (k <= torch.minimum(holders, right))
    log_weight = _log_choose(right, k) + _log_choose(total - right, holders - k)
    norm, observed = _log_choose(total, holders), _log_choose(right, a) + _log_choose(total - right, b)
    chance = torch.where(possible, (log_weight - norm).exp(), torch.zeros_like(log_weight))
    likelier = chance > (observed - norm).exp() * _TIE
    return chance.masked_fill(likelier, 0.0).sum(-1)


def fisher_strength(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """exp(-2 p), 0 for tables that say nothing (p = 1): [V] float64."""
    p = fisher_pvalue(a, b, c, d)
    return where_mask((-2 * p).exp(), p < _CERTAIN)


def information_gain(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Bits that presence gives about being right: H(right) - H(right | present), [V] float64."""
    a, b, c, d = (x.double() for x in (a, b, c, d))
    total = a + b + c + d
    conditional = ((a + b) * _entropy(a, b) + (c + d) * _entropy(c, d)) / total
    return _entropy(a + c, b + d) - conditional


def frequency_term(counts: Tensor) -> Tensor:
    """BM25-like difference of frequencies: [V] float64, from token counts [2, V] of the wrong and the right side."""
    size = counts.sum(-1, keepdim=True)
    share = counts / size
    wrong, right = (3 * share / (share + 1 + size / size.mean())).unbind()
    return right / (wrong + 1e-5) - wrong / (right + 1e-5)


def _counts(ids: Tensor, side: Tensor, number: int) -> Tensor:
    return torch.bincount(side * number + ids, minlength=2 * number).reshape(2, number).double()


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    # Impossible cells are masked by the caller; clamping keeps lgamma off its poles.
    rest = (n - k).clamp(min=0)
    return torch.lgamma(n + 1) - torch.lgamma(k.clamp(min=0) + 1) - torch.lgamma(rest + 1)


def _entropy(x: Tensor, y: Tensor) -> Tensor:
    """Binary entropy in bits of two counts, 0 when both are empty."""
    share = x / (x + y).clamp(min=1)
    other = y / (x + y).clamp(min=1)
    return -(torch.xlogy(share, share) + torch.xlogy(other, other)) / math.log(2)


@preset("ktae", paper="arXiv:2505.16826")
def ktae_preset(
    *, base: Literal["grpo", "dapo"] = "grpo", beta: float = 1.0, top: float = 1.0, eos: int | None = None
) -> Algorithm:
    """GRPO (no KL, token mean) or DAPO with token values. The released estimator runs beta = 1 whatever its scripts
    pass.
    """
    recipe: dict[str, Any] = {"preset": base}
    if base == "grpo":
        recipe |= {"kl_coef": 0.0, "aggregate": "token-mean"}
    return Algorithm.from_recipe(recipe).override(credit=[{"part": "ktae", "beta": beta, "top": top, "eos": eos}])
