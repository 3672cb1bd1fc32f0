"""Draws: the enumeration visits every branch with its probability; the generator follows the law."""

from __future__ import annotations

import pytest
import torch

from tokenloom.draw import Draw, RandomDraw, expectation, law_of


def test_every_branch_is_visited_once() -> None:
    def program(draw: Draw) -> tuple[int, ...]:
        first = draw.categorical(torch.tensor([1.0, 0.0, 3.0]))
        if first == 0:
            return (0, int(draw.bernoulli(0.25)))
        return (2, draw.categorical(torch.tensor([0.5, 0.5])), int(draw.bernoulli(1.0)))

    law = law_of(program)
    assert law == pytest.approx({(0, 0): 0.1875, (0, 1): 0.0625, (2, 0, 1): 0.375, (2, 1, 1): 0.375}, abs=1e-12)


def test_expectations_weigh_outcomes() -> None:
    found = expectation(lambda draw: ("a", 2.0) if draw.bernoulli(0.5) else ("b", 4.0))
    assert found == pytest.approx({"a": 1.0, "b": 2.0})


def test_endless_programs_are_stopped() -> None:
    def program(draw: Draw) -> int:
        for _ in range(20):
            draw.bernoulli(0.5)
        return 0

    with pytest.raises(RuntimeError, match="more than 100 branches"):
        law_of(program, most=100)


def test_generators_follow_the_law_and_repeat() -> None:
    p = torch.tensor([0.0, 2.0, 1.0, 0.0, 1.0])
    draws = [RandomDraw(torch.Generator().manual_seed(0)) for _ in range(2)]
    ids = [[d.categorical(p) for _ in range(4000)] for d in draws]
    assert ids[0] == ids[1]
    counts = torch.bincount(torch.tensor(ids[0]), minlength=5)
    assert counts[[0, 3]].sum() == 0
    # Three standard deviations of a binomial count at n = 4000, p = 1/2.
    assert abs(int(counts[1]) - 2000) < 3 * 31.6


@pytest.mark.parametrize("p", [[0.0, 0.0], [float("nan"), 1.0], [-1.0, 2.0]])
def test_what_is_no_law_is_refused(p: list[float]) -> None:
    with pytest.raises(ValueError, match="entries >= 0"):
        RandomDraw().categorical(torch.tensor(p))
    with pytest.raises(ValueError, match="entries >= 0"):
        law_of(lambda draw: draw.categorical(torch.tensor(p)))


def test_gamma_variates_follow_their_laws_and_have_no_branches() -> None:
    shapes = torch.tensor([0.05, 0.6, 1.0, 7.5])
    found = RandomDraw(torch.Generator().manual_seed(0)).gamma(shapes[:, None].expand(4, 20_000))
    assert found.dtype == torch.float64
    assert torch.equal(found, RandomDraw(torch.Generator().manual_seed(0)).gamma(shapes[:, None].expand(4, 20_000)))
    # Through their distribution function they are uniform: Kolmogorov's distance at p = 1e-5 is 2.47 / sqrt(n).
    uniform = torch.special.gammainc(shapes[:, None].double().expand_as(found), found).sort(-1).values
    steps = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert float((uniform - steps).abs().max()) < 2.47 / 20_000**0.5
    with pytest.raises(ValueError, match="above 0"):
        RandomDraw().gamma(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="no branches"):
        law_of(lambda draw: float(draw.gamma(torch.ones(1))))
