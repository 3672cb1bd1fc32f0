"""Linear layers through the processor's own kernels: the same numbers, no copy that autocast would not take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tokenloom.rollout.products import kernel_dtype, product, products

X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))


def layers(*sizes: int, bias: tuple[bool, ...]) -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [nn.Linear(24, size, bias=b) for size, b in zip(sizes, bias, strict=True)]


def called(linears: list[nn.Linear], x: Tensor) -> list[Tensor]:
    return [linear(x) for linear in linears]


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_are_those_of_the_layers(bias: tuple[bool, ...], autocast: bool) -> None:
    linears = layers(8, 3, 40, bias=bias)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = called(linears, X)
        apart, joined = products(linears)(X), product(linears)(X)
        single = product(linears[:1])(X)
    # Sums of 24 terms up to 3: in float32 their order matters by 24 * 3 * 2^-24; a bfloat16 result has 8 bits.
    close = {"atol": 2e-2, "rtol": 2**-7} if autocast else {"atol": 1e-5, "rtol": 0.0}
    for ours, theirs in zip(apart, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours.float(), theirs.float(), **close)
    assert torch.equal(joined, torch.cat(list(apart), -1))
    assert torch.allclose(single.float(), expected[0].float(), **close)


def test_float32_weights_are_read_in_place() -> None:
    (linear,) = layers(8, bias=(True,))
    with torch.no_grad():
        ours = product([linear])
        before = ours(X)
        linear.weight.mul_(2.0)
        linear.bias.mul_(2.0)
        assert torch.allclose(ours(X), 2 * before, atol=1e-5)


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


def test_what_is_no_plain_linear_layer_is_called() -> None:
    plain, odd = layers(8, bias=(True,))[0], Odd(24, 4)
    assert kernel_dtype([plain, odd]) is None
    assert kernel_dtype([plain.double()]) is None
    plain.float()
    with torch.no_grad():
        first, second = products([plain, odd])(X)
        assert torch.allclose(first, plain(X), atol=1e-5)
        assert torch.equal(second, odd(X))
        assert torch.equal(product([plain, odd])(X), torch.cat((first, second), -1))


def test_weights_already_in_bfloat16_are_not_copied() -> None:
    (linear,) = layers(8, bias=(False,))
    linear.bfloat16()
    x = X.bfloat16()
    with torch.no_grad():
        ours = product([linear])
        linear.weight.zero_()
        assert not ours(x).any()
