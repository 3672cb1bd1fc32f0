"""AWRS: the expected weight of every accepted token is its probability, by enumeration of all orders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.draw import RandomDraw, expectation, law_of
from tokenloom.methods.decoding.awrs import awrs_token

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
VALID = {1, 3, 4}
PEAKED = torch.tensor([0.8, 0.1, 0.06, 0.04], dtype=torch.float64)


def _total(p: Tensor, valid: set[int], scale: float = 0.0, **options: Any) -> list[float]:
    def program(draw: Any) -> tuple[int, float]:
        token, log_weight = awrs_token(p.log() + scale, lambda t: t in valid, draw, tail=0.0, **options)
        assert log_weight == -math.inf or token in valid
        return token, math.exp(log_weight - scale)

    total = expectation(program)
    return [total.get(t, 0.0) if t in valid else 0.0 for t in range(len(p))]


def _mass(p: Tensor, valid: set[int]) -> list[float]:
    return [float(p[t]) if t in valid else 0.0 for t in range(len(p))]


@pytest.mark.parametrize("cap", [None, 2, 3])
@pytest.mark.parametrize("valid", [VALID, {0}, {2}, {0, 1, 2, 3, 4}, {0, 1, 2, 3}])
def test_recursive_is_proper(valid: set[int], cap: int | None) -> None:
    total = _total(P, valid, mode="recursive", max_rejects=cap)
    if cap is None or len(P) - len(valid) < cap:
        assert total == pytest.approx(_mass(P, valid), abs=1e-9)
    else:
        assert sum(total) <= sum(_mass(P, valid)) + 1e-9


def test_the_worked_example() -> None:
    assert _total(P, VALID, mode="recursive", scale=3.0) == pytest.approx([0, 0.3, 0, 0.1, 0.05], abs=1e-9)
    assert _total(P, VALID, mode="recursive", max_rejects=2) == pytest.approx([0, 0.3, 0, 0.1, 0.05], abs=1e-9)


@pytest.mark.parametrize(("accepts", "cap"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_geometric_is_proper_under_a_cap(accepts: int, cap: int) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for valid in ({1}, {0, 2}, {2}, {0, 1, 2}):
        total = _total(p, valid, mode="geometric", max_accepts=accepts, max_rejects=cap)
        assert total == pytest.approx(_mass(p, valid), abs=1e-9), valid


def test_geometric_without_a_cap() -> None:
    p = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    for valid in ({0, 1}, {0, 1, 2}):
        total = _total(p, valid, mode="geometric")
        assert total == pytest.approx(_mass(p, valid), abs=1e-9), valid


def test_auto_asks_about_a_peak_first_and_stays_proper() -> None:
    for valid in ({0, 2}, {1, 3}, {3}):
        calls: list[int] = []

        def accept(token: int, valid: set[int] = valid, calls: list[int] = calls) -> bool:
            calls.append(token)
            return token in valid

        awrs_token(PEAKED.log(), accept, RandomDraw(torch.Generator().manual_seed(0)))
        assert calls[0] == 0
        assert len(calls) == len(set(calls)), "no token is asked about twice"
        if 0 not in valid:
            assert _total(PEAKED, valid) == pytest.approx(_mass(PEAKED, valid), abs=1e-9), valid
        assert _total(PEAKED, valid, max_rejects=4) == pytest.approx(_mass(PEAKED, valid), abs=1e-9), valid


@pytest.mark.parametrize("mode", ["auto", "recursive", "geometric", "improper"])
def test_always_true_and_always_false(mode: Any) -> None:
    for p in (P, PEAKED):
        law = law_of(lambda draw, p=p: awrs_token(p.log(), lambda _: True, draw, mode=mode))  # type: ignore[misc]
        assert all(weight == pytest.approx(0.0, abs=1e-12) for _, weight in law)
        for t in range(len(p)):
            assert sum(m for (x, _), m in law.items() if x == t) == pytest.approx(float(p[t]), abs=1e-9)
        dead = awrs_token(p.log(), lambda _: False, RandomDraw(), mode=mode)
        assert dead[1] == -math.inf


def test_a_rest_ends_the_search_exactly() -> None:
    p = torch.tensor([0.5, 0.5 - 3e-7, 2e-7, 1e-7], dtype=torch.float64)
    allowed = torch.tensor([False, False, True, True])
    asked: list[int] = []

    def program(draw: Any) -> tuple[int, float]:
        def accept(token: int) -> bool:
            asked.append(token)
            return bool(allowed[token])

        token, log_weight = awrs_token(p.log(), accept, draw, rest=lambda: allowed)
        return token, math.exp(log_weight)

    total = expectation(program)
    assert total[2] == pytest.approx(2e-7, rel=1e-9)
    assert total[3] == pytest.approx(1e-7, rel=1e-9)
    given_up = law_of(lambda draw: awrs_token(p.log(), lambda t: bool(allowed[t]), draw)[1])
    assert given_up[-math.inf] > 0.999
    assert awrs_token(p.log(), lambda _: False, RandomDraw(), rest=lambda: allowed & False)[1] == -math.inf


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_patience_changes_the_questions_not_the_expectation(patience: int) -> None:
    for valid, p in ((VALID, P), ({1, 3}, PEAKED)):
        allowed = torch.tensor([t in valid for t in range(len(p))])
        total = _total(p, valid, rest=lambda allowed=allowed: allowed, patience=patience)
        assert total == pytest.approx(_mass(p, valid), abs=1e-9)
    law = law_of(
        lambda draw: awrs_token(P.log(), lambda t: t in VALID, draw, rest=lambda: P > 1, mode="improper", patience=0)
    )
    assert set(law) == {(-1, -math.inf)}


def test_another_target() -> None:
    target = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1], dtype=torch.float64)
    total = _total(P, VALID, target=target.log())
    assert total == pytest.approx(_mass(target, VALID), abs=1e-9)


def test_improper_takes_the_first_accepted() -> None:
    law = law_of(lambda draw: awrs_token(P.log(), lambda t: t in VALID, draw, mode="improper"))
    for t in VALID:
        assert law[t, 0.0] == pytest.approx(float(P[t]) / 0.45, abs=1e-9)


def test_few_questions() -> None:
    p = torch.linspace(1, 2, 1000, dtype=torch.float64)
    p /= p.sum()
    calls = 0

    def accept(token: int) -> bool:
        nonlocal calls
        calls += 1
        return token % 2 == 0

    draw = RandomDraw(torch.Generator().manual_seed(1))
    for _ in range(200):
        awrs_token(p.log(), accept, draw)
    assert calls / 200 < 4


def test_limits_below_two_are_refused() -> None:
    for options in ({"max_accepts": 1}, {"max_rejects": 1}):
        with pytest.raises(ValueError, match="at least 2"):
            awrs_token(P.log(), lambda _: True, RandomDraw(), **options)
    awrs_token(P.log(), lambda _: True, RandomDraw(), mode="improper", max_rejects=1)
    with pytest.raises(ValueError, match="no mass"):
        awrs_token(torch.full((3,), -torch.inf), lambda _: True, RandomDraw())
