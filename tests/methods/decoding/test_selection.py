"""Rules that sort no more than they must keep what a sort of the whole row keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.locally_typical import locally_typical
from tokenloom.methods.decoding.selection import largest
from tokenloom.methods.decoding.top_h import top_h
from tokenloom.methods.decoding.top_k import top_k
from tokenloom.methods.decoding.top_p import top_p

VOCAB = 9001


def hostile_scores(dtype: torch.dtype) -> Tensor:
    """Flat, peaked and certain rows, with ties of all sorts, impossible tokens and tokens whose mass vanishes."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(12, VOCAB, generator=g, dtype=dtype)
    rows = [normal[i] * sharp for i, sharp in enumerate((0.01, 0.3, 1.0, 3.0, 10.0, 1e4))]
    zipf = -1.5 * torch.arange(1, VOCAB + 1, dtype=dtype).log()
    rows.append(zipf[torch.randperm(VOCAB, generator=g)])
    rows.append(torch.zeros(VOCAB, dtype=dtype))
    rows.append((normal[6] > 0).to(dtype) * 1.5)
    rows.append((2 * normal[7]).round())
    rows.append((4 * normal[8]).bfloat16().to(dtype))
    rows.append(torch.where(torch.arange(VOCAB) % 7 == 3, normal[9], -torch.inf))
    rows.append(torch.where(torch.arange(VOCAB) < 2, 0.0, -torch.inf).to(dtype))
    rows.append(torch.where(torch.arange(VOCAB) == VOCAB - 1, 3.0, -torch.inf).to(dtype))
    rows.append(torch.full((VOCAB,), -torch.inf, dtype=dtype))
    return torch.stack(rows)


def scattered(order: Tensor, kept: Tensor) -> Tensor:
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def sorted_top_k(probs: Tensor, k: int) -> Tensor:
    least = probs.sort(descending=True).values[:, min(k, VOCAB) - 1, None]
    return (probs >= least) & (probs > 0)


def sorted_top_p(probs: Tensor, p: float) -> Tensor:
    masses, order = probs.sort(descending=True, stable=True)
    return scattered(order, masses.flip(-1).cumsum(-1).flip(-1) > 1 - p)


def sorted_typical(probs: Tensor, mass: float) -> Tensor:
    surprisals = -probs.log()
    shifts = (surprisals - (probs * surprisals).nansum(-1, keepdim=True)).abs()
    ascending, order = shifts.sort(stable=True)
    behind = probs.gather(-1, order).flip(-1).cumsum(-1).flip(-1)[:, 1:]
    return (shifts <= ascending.gather(-1, (behind > 1 - mass).sum(-1, keepdim=True))) & (probs > 0)


def sorted_released(probs: Tensor, given: tuple[float, int]) -> Tensor:
    alpha, top_n = given
    masses, order = probs.sort(descending=True, stable=True)
    masses = masses[:, :top_n] / masses[:, :top_n].sum(-1, keepdim=True)
    entropies = torch.special.entr(masses).cumsum(-1)
    keep = torch.zeros_like(probs, dtype=torch.bool)
    return keep.scatter(-1, order[:, :top_n], before_the_bound(masses, entropies, alpha))


def sorted_paper(probs: Tensor, alpha: float) -> Tensor:
    masses, order = probs.sort(descending=True, stable=True)
    total = masses.cumsum(-1)
    entropies = total.log() + torch.special.entr(masses).cumsum(-1) / total
    return scattered(order, before_the_bound(masses, entropies, alpha))


def before_the_bound(masses: Tensor, entropies: Tensor, alpha: float) -> Tensor:
    bound = alpha * entropies[:, -1:] if alpha < 1 else entropies.amax(-1, keepdim=True)
    kept = ((entropies > bound).cumsum(-1) == 0) & (masses > 0)
    kept[:, 0] = True
    return kept


Rule = Callable[[Tensor, Any], Tensor]
PAIRS: list[tuple[Rule, Rule, tuple[Any, ...]]] = [
    (lambda p, k: top_k(p, k=k), sorted_top_k, (1, 2, 34, 35, 36, 500, VOCAB - 1, VOCAB + 1)),
    (lambda p, share: top_p(p, p=share), sorted_top_p, (1e-9, 0.1, 0.5, 0.75, 0.9, 1 - 1e-6, 1.0)),
    (lambda p, mass: locally_typical(p, mass=mass), sorted_typical, (1e-9, 0.2, 0.5, 0.95, 1 - 1e-6, 1.0)),
    (lambda p, given: top_h(p, alpha=given[0], top_n=given[1]), sorted_released,
     ((0.4, 100), (0.7, 100), (1.0, 100), (0.4, 2), (0.5, 1), (0.4, VOCAB), (1.0, VOCAB))),
    (lambda p, alpha: top_h(p, alpha=alpha, variant="paper"), sorted_paper, (0.1, 0.4, 0.5, 0.9, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", PAIRS, ids=["top-k", "top-p", "locally-typical", "top-h", "top-h of the paper"])
def test_kept_is_what_a_sort_keeps(pair: tuple[Rule, Rule, tuple[Any, ...]], dtype: torch.dtype) -> None:
    rule, by_sorting, parameters = pair
    rows = hostile_scores(dtype).softmax(-1)
    # Also as a view whose rows are columns of something else, where no two sums are equal but for their order.
    for probs in (rows, rows[:7].T.contiguous().T):
        for given in parameters:
            found, wanted = rule(probs, given), by_sorting(probs, given)
            differ = (found != wanted).any(-1).nonzero().flatten().tolist()
            assert not differ, f"{given}: rows {differ}: {found.sum(-1)[differ]}, {wanted.sum(-1)[differ]}"
    assert rule(rows[:0], parameters[0]).shape == (0, VOCAB)


@pytest.mark.parametrize("vocab", [1, 63, 64, 129, 9001])
def test_the_largest_values(vocab: int) -> None:
    values = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    values[1, vocab // 2] = torch.nan
    values[2] = -torch.inf
    for k in {1, min(3, vocab), min(35, vocab), vocab}:
        wanted = values.sort(descending=True).values[:, :k]
        torch.testing.assert_close(largest(values, k), wanted, rtol=0, atol=0, equal_nan=True)
