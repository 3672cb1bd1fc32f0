"""Masked and group operations against plain Python loops; nothing off the mask is ever seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom import masked as m

HOSTILE = [float("nan"), float("inf"), float("-inf"), 1e300]
NUMBER = st.floats(-8, 8, allow_nan=False, width=32)


class Grid(NamedTuple):
    x: Tensor
    mask: Tensor

    def values(self) -> list[float]:
        """What the mask selects, row by row."""
        return [float(v) for v in self.x[self.mask]]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """[B, T] of any size, nothing included, with hostile values off the mask."""
    b, t = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    mask = [[draw(st.booleans()) for _ in range(t)] for _ in range(b)]
    x = [[draw(NUMBER) if here else draw(st.sampled_from(HOSTILE)) for here in row] for row in mask]
    return Grid(torch.tensor(x, dtype=torch.float64).reshape(b, t), torch.tensor(mask, dtype=torch.bool).reshape(b, t))


class Groups(NamedTuple):
    x: Tensor
    ids: Tensor
    where: Tensor

    def of(self, row: int) -> list[float]:
        """The counted values of a row's group."""
        rows = range(len(self.ids))
        return [float(self.x[j]) for j in rows if self.ids[j] == self.ids[row] and self.where[j]]


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    """Scattered groups of any size with arbitrary ids; rows out of `where` are hostile."""
    n = draw(st.integers(0, 9))
    ids = [draw(st.sampled_from([-7, 0, 3, 2**40])) for _ in range(n)]
    where = [draw(st.booleans()) for _ in range(n)]
    x = [draw(NUMBER) if here else draw(st.sampled_from(HOSTILE)) for here in where]
    return Groups(
        torch.tensor(x, dtype=torch.float64),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(where, dtype=torch.bool),
    )


def close(a: Tensor, b: list[float] | float) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).reshape(a.shape), rtol=1e-9, atol=1e-9)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def var(values: list[float], correction: int = 1) -> float:
    return sum((v - mean(values)) ** 2 for v in values) / max(len(values) - correction, 1)


@given(grids())
@settings(max_examples=80, deadline=None)
def test_sums_means_and_variances(grid: Grid) -> None:
    x, mask = grid
    values = grid.values()
    close(m.masked_sum(x, mask), sum(values))
    close(m.masked_mean(x, mask), mean(values))
    close(m.masked_var(x, mask), var(values))
    close(m.masked_var(x, mask, correction=0), var(values, 0))
    rows = [Grid(x[i : i + 1], mask[i : i + 1]).values() for i in range(len(x))]
    close(m.masked_sum(x, mask, -1), [sum(r) for r in rows])
    close(m.masked_mean(x, mask, -1), [mean(r) for r in rows])


@given(grids())
@settings(max_examples=80, deadline=None)
def test_whiten(grid: Grid) -> None:
    out = m.whiten(*grid)
    values = grid.values()
    assert (out[~grid.mask] == 0).all()
    if len(set(values)) < 2:
        assert (out == 0).all()
    else:
        scale = math.sqrt(var(values) + 1e-8)
        close(out[grid.mask], [(v - mean(values)) / scale for v in values])


def test_whitening_equal_values_gives_exactly_zero() -> None:
    # The float32 mean of 3 x 0.9 is off by 6e-8, which 1 / sqrt(eps) would make 6e-4.
    x = torch.full((1, 3), 0.9)
    assert (x - x.mean()).abs().max() > 0
    assert m.whiten(x, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


@given(grids(), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_quantile_is_that_of_torch(grid: Grid, q: float) -> None:
    out = m.masked_quantile(*grid, q)
    if not grid.mask.any():
        assert out.isnan()
    else:
        torch.testing.assert_close(out, torch.quantile(grid.x[grid.mask], q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_quantile_refuses_what_is_none(q: float) -> None:
    with pytest.raises(ValueError, match=r"a quantile lies in \[0, 1\]"):
        m.masked_quantile(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), q)


@given(grids())
@settings(max_examples=60, deadline=None)
def test_positions(grid: Grid) -> None:
    x, mask = grid
    last = [[j == max((k for k, h in enumerate(r) if h), default=-1) for j in range(len(r))] for r in mask.tolist()]
    assert m.last_position(mask).tolist() == last
    row = torch.arange(1.0, len(mask) + 1)
    assert m.at_last_position(row, mask).tolist() == [[(i + 1.0) * h for h in r] for i, r in enumerate(last)]
    assert m.to_tokens(row, mask).tolist() == [[(i + 1.0) * h for h in r] for i, r in enumerate(mask.tolist())]
    assert m.where_mask(x, mask, 5.0)[~mask].eq(5).all()
    ratio = m.clamped_exp(x, mask)
    assert (ratio[~mask] == 1).all()
    close(ratio[mask], [math.exp(v) for v in grid.values()])


@given(st.lists(st.integers(0, 5), max_size=5))
@settings(max_examples=30, deadline=None)
def test_valid_positions(lengths: list[int]) -> None:
    out = m.valid_positions(torch.tensor(lengths, dtype=torch.int64), 5)
    assert out.tolist() == [[t < n for t in range(5)] for n in lengths]


def test_exp_is_clamped_before_it_can_overflow() -> None:
    x = torch.tensor([[1e4, -1e4, float("inf")]], requires_grad=True)
    out = m.clamped_exp(x, torch.ones(1, 3, dtype=torch.bool))
    close(out.detach(), [math.exp(20), math.exp(-20), math.exp(20)])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0]]


@given(groups())
@settings(max_examples=120, deadline=None)
def test_group_operations(case: Groups) -> None:
    x, ids, where = case
    found = [case.of(i) for i in range(len(ids))]
    close(m.group_sum(x, ids, where), [sum(v) for v in found])
    close(m.group_mean(x, ids, where), [mean(v) for v in found])
    close(m.group_extreme(x, ids, where), [max(v, default=-math.inf) for v in found])
    close(m.group_extreme(x, ids, where, largest=False), [min(v, default=math.inf) for v in found])
    assert m.group_size(ids, where).tolist() == [len(v) for v in found]
    assert m.group_constant(x, ids, where).tolist() == [len(set(v)) <= 1 for v in found]
    for correction in (0, 1):
        close(m.group_std(x, ids, where, correction=correction), [math.sqrt(var(v, correction)) for v in found])


@given(groups())
@settings(max_examples=60, deadline=None)
def test_group_operations_over_everything(case: Groups) -> None:
    x = torch.where(case.where, case.x, torch.zeros_like(case.x))
    everyone = Groups(x, case.ids, torch.ones_like(case.where))
    found = [everyone.of(i) for i in range(len(x))]
    close(m.group_mean(x, case.ids), [mean(v) for v in found])
    close(m.group_std(x, case.ids), [math.sqrt(var(v)) for v in found])
    assert m.group_size(case.ids).tolist() == [len(v) for v in found]


@given(st.floats(-100, 100, width=32), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_constant_groups_have_a_std_of_exactly_zero_in_float32(value: float, size: int) -> None:
    x, ids = torch.full((size + 1,), value), torch.tensor([4] * size + [9])
    assert (m.group_std(x, ids) == 0).all()
    assert m.group_constant(x, ids).all()


def test_the_classic_rounding_trap() -> None:
    x, ids = torch.full((3,), 0.9), torch.zeros(3, dtype=torch.int64)
    assert x.std() > 0  # what a plain std says of three equal numbers
    assert m.group_std(x, ids).tolist() == [0, 0, 0]
    assert m.group_std(torch.full((3,), 0.1), ids).tolist() == [0, 0, 0]


def test_group_numbers_are_dense() -> None:
    dense, n = m.group_index(torch.tensor([2**40, -7, 2**40, 3]))
    assert n == 3
    assert dense.tolist() == [2, 0, 2, 1]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": m.masked_sum,
    "mean": m.masked_mean,
    "row mean": lambda x, mask: m.masked_mean(x, mask, -1),
    "var": m.masked_var,
    "whiten": m.whiten,
    "exp": m.clamped_exp,
    "where": m.where_mask,
    "quantile": lambda x, mask: m.masked_quantile(x, mask, 0.3),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fill", HOSTILE)
def test_gradients_off_the_mask_are_exactly_zero(name: str, fill: float) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    clean = torch.tensor([[0.3, 0.0, -1.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    poisoned = torch.where(mask, clean, torch.full_like(clean, fill))
    results, gradients = [], []
    for x in (clean.clone().requires_grad_(), poisoned.clone().requires_grad_()):
        out = OPERATIONS[name](x, mask)
        # Uneven weights: the plain sum of whitened values has no gradient at all.
        (out * torch.arange(1.0, out.numel() + 1).reshape(out.shape)).sum().backward()
        results.append(out.detach())
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*results)
    assert (gradients[1][~mask] == 0).all()
    assert torch.equal(*gradients)
    assert (gradients[1][mask] != 0).any()


GROUP_OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": m.group_sum,
    "mean": m.group_mean,
    "std": m.group_std,
    "extreme": m.group_extreme,
}


@pytest.mark.parametrize("name", GROUP_OPERATIONS)
@pytest.mark.parametrize("fill", HOSTILE)
def test_gradients_of_uncounted_rows_are_exactly_zero(name: str, fill: float) -> None:
    ids = torch.tensor([0, 1, 0, 1, 0, 2, 3])
    where = torch.tensor([True, True, False, True, True, True, False])
    x = torch.tensor([0.5, 0.9, fill, 0.9, 1.5, 2.0, fill], dtype=torch.float64, requires_grad=True)
    out = GROUP_OPERATIONS[name](x, ids, where)
    out[where].sum().backward()
    assert x.grad is not None
    assert (x.grad[~where] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any()


def test_rows_are_picked_by_index() -> None:
    assert m.row_index([2, 0]).tolist() == [2, 0]
    assert m.row_index([]).dtype == torch.int64
    with pytest.raises(ValueError, match="bool mask"):
        m.row_index([True])
