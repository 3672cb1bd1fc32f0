"""The fused log-prob: values and gradients against plain autograd, memory, precision, hostile rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenloom.kernels import linear_logprobs

SHAPES = [
    {},
    {"temperature": 0.7},
    {"scale": 0.25},
    {"scale": 0.5, "temperature": 1.7},
    {"softcap": 2.0},
    {"softcap": 2.0, "scale": 1.5, "temperature": 0.6},
]


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition, with the whole [N, V] matrix."""
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    law = torch.log_softmax(logits / temperature, -1)
    return law.gather(-1, targets[:, None])[:, 0], -(law.exp() * law).sum(-1)


def inputs(n: int = 7, d: int = 5, v: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, d), (v, d), (v,))
    )
    return hidden, weight, torch.randint(v, (n,), generator=generator), bias


def test_worked_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weight = torch.tensor([[0.0, 0.0], [1.0986123, 0.0], [0.0, 0.6931472]])
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([1, 2]), need_entropy=True)
    # Odds 1 : 3 : 1, then 1 : 1 : 4.
    assert logprobs.exp().tolist() == pytest.approx([3 / 5, 4 / 6], abs=1e-6)
    assert entropies is not None
    assert entropies.tolist() == pytest.approx([0.950271, 0.867563], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_are_those_of_the_definition(shape: dict[str, Any], biased: bool, chunk: int) -> None:
    hidden, weight, targets, bias = inputs()
    leaves = [hidden, weight, *([bias] if biased else [])]
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)

    def total(logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        assert entropies is not None
        return (weights * logprobs).sum() + (weights.flip(0) * entropies).sum()

    ours = linear_logprobs(
        hidden, weight, targets, bias=bias if biased else None, need_entropy=True, chunk=chunk, **shape
    )
    theirs = plain(hidden, weight, targets, bias if biased else None, **shape)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ours_grads = torch.autograd.grad(total(*ours), leaves)
    theirs_grads = torch.autograd.grad(total(*theirs), leaves)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    alone, none = linear_logprobs(hidden, weight, targets, bias=bias if biased else None, chunk=chunk, **shape)
    assert none is None
    torch.testing.assert_close(alone, ours[0], rtol=1e-12, atol=1e-12)
    expected = plain(hidden, weight, targets, bias if biased else None, **shape)[0]
    a = torch.autograd.grad((weights * alone).sum(), leaves)
    b = torch.autograd.grad((weights * expected).sum(), leaves)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: dict[str, Any]) -> None:
    hidden, weight, targets, bias = inputs(n=4, d=3, v=6)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropies = linear_logprobs(hidden, weight, targets, bias=bias, need_entropy=True, chunk=3, **shape)
        assert entropies is not None
        return logprobs, entropies

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_float32_agrees_with_float64() -> None:
    exact = inputs(40, 32, 101)
    single = [x.detach().float() if x.is_floating_point() else x for x in exact]
    hidden, weight, targets, bias = single
    ours = linear_logprobs(hidden, weight, targets, bias=bias, need_entropy=True, chunk=8)
    theirs = plain(*exact[:3], exact[3])
    # A logit sums 32 products, the norm 101 exponentials of logits up to `largest`.
    largest = float((exact[0] @ exact[1].T).detach().abs().max())
    tolerance = torch.finfo(torch.float32).eps * (32**0.5 * largest + 101**0.5)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert a.dtype == torch.float32
        assert float((a.double() - b).detach().abs().max()) < tolerance


def test_16_bit_products_keep_float32_arithmetic() -> None:
    """Rounding enters through the inputs and the logits (bf16), not through the softmax after them."""
    hidden, weight, targets, _ = inputs(64, 32, 501, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropies = linear_logprobs(hidden, weight, targets, need_entropy=True, chunk=16)
        assert entropies is not None
        (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.dtype == entropies.dtype == torch.float32
    rounded = hidden.detach().bfloat16() @ weight.detach().bfloat16().T
    law = torch.log_softmax(rounded.double(), -1)
    wanted = law.gather(-1, targets[:, None])[:, 0]
    assert float((logprobs.double() - wanted).detach().abs().max()) < 501 * torch.finfo(torch.float32).eps
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    sum(x.sum() for x in plain(*exact, targets, None)).backward()  # type: ignore[union-attr]  # never the int 0
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < 4 * torch.finfo(torch.bfloat16).eps


def test_bfloat16_weights_get_bfloat16_gradients() -> None:
    hidden, weight, targets, bias = inputs(9, 8, 33, torch.bfloat16)
    logprobs, _ = linear_logprobs(hidden, weight, targets, bias=bias, chunk=2)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in (hidden, weight, bias))


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor an operation returns, and which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_the_logit_matrix_never_exists() -> None:
    n, d, v, chunk = 400, 4, 300, 10
    hidden, weight, targets, bias = inputs(n, d, v, torch.float32)
    with LargestTensor() as seen:
        logprobs, entropies = linear_logprobs(hidden, weight, targets, bias=bias, need_entropy=True, chunk=chunk)
        assert entropies is not None
        (logprobs + entropies).sum().backward()
    assert seen.largest == chunk * v
    with LargestTensor() as naive:
        plain(hidden, weight, targets, bias)
    assert naive.largest == n * v  # the recorder does see such a matrix


def test_rows_without_gradient_are_exactly_zero_and_never_recomputed() -> None:
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        hidden[2] = float("nan")
        hidden[4] = float("inf")
    logprobs, entropies = linear_logprobs(hidden, weight, targets, need_entropy=True, chunk=3)
    assert entropies is not None
    live = torch.tensor([True, True, False, True, False, True, True])
    (logprobs[live].sum() + entropies[live].sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad[~live].eq(0).all()
    assert hidden.grad[live].ne(0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_computed_for_frozen_weights(frozen: bool) -> None:
    hidden, weight, targets, _ = inputs()
    with LargestTensor() as seen:
        logprobs, _ = linear_logprobs(hidden, weight.detach() if frozen else weight, targets, chunk=100)
        logprobs.sum().backward()
    # Logits, logits again, the gradient of the hidden states; the weight's is added into its buffer.
    assert seen.operations.count("mm") == 3
    assert seen.operations.count("addmm_") == (0 if frozen else 1)


def test_no_rows() -> None:
    hidden, weight, targets, _ = inputs(0)
    logprobs, entropies = linear_logprobs(hidden, weight, targets, need_entropy=True)
    assert entropies is not None
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == entropies.shape == (0,)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([0, 0]), need_entropy=True)
    assert entropies is not None
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropies.tolist() == [0.0, 0.0]
    (logprobs + entropies).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "must be positive"),
        ({"hidden": torch.zeros(2, 3, 5)}, r"\[N, D\]"),
        ({"hidden": torch.zeros(7, 4)}, r"\(7, 4\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be \[7\]"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets, _ = inputs()
    given = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)
