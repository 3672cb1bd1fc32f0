"""What the fused log-prob does not do: hold the logit matrix, score a row twice, multiply rows that are dead."""

from __future__ import annotations

import pytest
import torch

from kernels.definition import ROWS, Recorder, defined, inputs
from tokenloom.kernels import linear_logprobs


def test_the_logit_matrix_never_exists() -> None:
    """At a vocabulary of 152k, each buffer (a handful at once) is less than a 400th of the matrix."""
    m, v = 700, 151936
    hidden, weight, bias, targets = inputs(m, 1, v, dtype=torch.float32)
    with Recorder() as seen:
        found = linear_logprobs(hidden, None, targets, weight, bias)
        found.logprobs.sum().backward()
    assert seen.largest < m * v / 400


def test_the_recorder_sees_a_logit_matrix() -> None:
    hidden, weight, bias, targets = inputs(400, 4, 3000, dtype=torch.float32)
    with Recorder() as seen:
        defined(hidden, None, targets, weight, bias)
    assert seen.largest == 400 * 3000
    assert seen.multiplications == 400 * 3000 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_is_scored_once_however_many_targets_it_has(dtype: torch.dtype) -> None:
    """Five of nine rows have targets: they alone are multiplied, once in the forward, three times in the backward."""
    hidden, weight, bias, targets = inputs(dtype=dtype)
    used, cost = len(ROWS.unique()), weight.numel()
    with Recorder() as forward:
        found = linear_logprobs(hidden, ROWS, targets, weight, bias, need_entropy=True, top_k=2)
    assert forward.multiplications == used * cost
    with Recorder() as backward:
        found.logprobs.sum().backward()
    assert backward.multiplications == 3 * used * cost


@pytest.mark.parametrize("rows", [None, ROWS], ids=["identity", "shared"])
def test_the_backward_multiplies_rows_with_a_gradient_only(rows: torch.Tensor | None) -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        hidden[0] = float("nan")
        hidden[5] = float("inf")
    found = linear_logprobs(hidden, rows, targets, weight, bias, need_entropy=True)
    assert found.entropies is not None
    named = torch.arange(9) if rows is None else rows
    weights = (~torch.isin(named, torch.tensor([0, 5, 8]))).double()
    live = torch.isin(torch.arange(9), named[weights > 0])
    with Recorder() as backward:
        # Dead targets are selected away, or hold a gradient of exactly zero: both must do.
        torch.where(weights > 0, found.logprobs, 0.0).sum().add((found.entropies[weights > 0]).sum()).backward()
    assert backward.multiplications == 3 * int(live.sum()) * weight.numel()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad[~live].eq(0).all()
    assert hidden.grad[live].ne(0).any(-1).all()
    assert weight.grad.isfinite().all()


def test_a_gradient_of_zero_everywhere_costs_nothing() -> None:
    hidden, weight, bias, targets = inputs()
    found = linear_logprobs(hidden, None, targets, weight, bias)
    with Recorder() as backward:
        (0.0 * found.logprobs).sum().backward()
    assert backward.multiplications == 0
    for x in (hidden, weight, bias):
        assert x.grad is not None
        assert x.grad.eq(0).all()


@pytest.mark.parametrize(("frozen", "products"), [("weight", 2), ("hidden", 2), ("neither", 3)])
def test_nothing_is_computed_for_frozen_inputs(frozen: str, products: int) -> None:
    """Logits again, and one product for each gradient that somebody wants."""
    hidden, weight, bias, targets = inputs()
    found = linear_logprobs(
        hidden.detach() if frozen == "hidden" else hidden,
        None,
        targets,
        weight.detach() if frozen == "weight" else weight,
        bias,
    )
    with Recorder() as backward:
        found.logprobs.sum().backward()
    assert backward.multiplications == products * hidden.numel() * len(weight)
