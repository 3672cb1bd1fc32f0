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


class Groups:
    """Questions where a refusal refutes a whole group."""

    def __init__(self, groups: list[set[int]], valid: set[int]) -> None:
        self.groups, self.valid = groups, valid
        self.refused: set[int] = set()

    def accept(self, token: int) -> bool:
        assert token not in self.refused, "what is known to be refused is not asked about"
        return token in self.valid

    def refused_with(self, token: int) -> Tensor:
        [group] = [g for g in self.groups if token in g]
        self.refused |= group
        return torch.tensor(sorted(group))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("recursive", {}),
        ("recursive", {"max_rejects": 2}),
        ("geometric", {"max_rejects": 3}),
        ("geometric", {"max_rejects": 2, "max_accepts": 3}),
        ("auto", {}),
    ],
)
def test_a_refusal_that_takes_others_along_stays_proper(mode: Any, options: Any) -> None:
    p = torch.tensor([0.3, 0.1, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    peaked = torch.tensor([0.7, 0.1, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
    for law, groups, valid in (
        (p, [{0, 1}, {2, 5}], {3, 4}),
        (p, [{0, 1, 2}, {3, 5}], {4}),
        (p, [{4, 5}], {0, 1, 2, 3}),
        (peaked, [{0, 1, 2}, {3}], {4, 5}),
    ):

        def program(draw: Any, law: Tensor = law, groups: Any = groups, valid: Any = valid) -> tuple[int, float]:
            asked = Groups(groups, valid)
            token, log_weight = awrs_token(
                law.log(),
                asked.accept,
                Orders(draw, law),
                refused_with=asked.refused_with,
                tail=0.0,
                mode=mode,
                **options,
            )
            return token, math.exp(log_weight)

        total = expectation(program)
        found = [total.get(t, 0.0) if t in valid else 0.0 for t in range(len(law))]
        assert found == pytest.approx(_mass(law, valid), abs=1e-9), (groups, valid)
    nothing = Groups([{0, 1, 2}, {3, 4, 5}], set())
    dead = awrs_token(p.log(), nothing.accept, RandomDraw(), refused_with=nothing.refused_with, tail=0.0, mode=mode)
    assert dead[1] == -math.inf


class Orders:
    """Noise that makes a race end in every order, each with the probability of draws without replacement."""

    def __init__(self, draw: Any, p: Tensor) -> None:
        self.draw, self.p, self.races = draw, p, 0
        self.categorical, self.bernoulli = draw.categorical, draw.bernoulli

    def gamma(self, shapes: Tensor) -> Tensor:
        assert bool((shapes == 1).all())
        self.races += 1
        left, noise = self.p.clone(), torch.zeros_like(self.p)
        for place in range(1, len(left) + 1):
            token = self.draw.categorical(left)
            noise[token] = place * self.p[token]
            left[token] = 0.0
        return noise


@pytest.mark.parametrize("singly", [0, 1])
def test_an_order_drawn_at_once_leaves_out_what_a_refusal_takes_along(monkeypatch: Any, singly: int) -> None:
    monkeypatch.setattr("tokenloom.methods.decoding.awrs._SINGLY", singly)
    for groups, valid in (([{0, 2}, {4}], {1, 3}), ([{0, 1, 2}, {3}], {4})):

        def program(draw: Any, groups: Any = groups, valid: Any = valid) -> tuple[int, float]:
            asked = Groups(groups, valid)
            token, log_weight = awrs_token(
                P.log(), asked.accept, Orders(draw, P), refused_with=asked.refused_with, tail=0.0, mode="recursive"
            )
            return token, math.exp(log_weight)

        total = expectation(program)
        assert [total.get(t, 0.0) if t in valid else 0.0 for t in range(5)] == pytest.approx(_mass(P, valid), abs=1e-9)


@pytest.mark.parametrize("singly", [0, 1])
@pytest.mark.parametrize(("mode", "cap"), [("recursive", None), ("geometric", 2), ("auto", 3)])
def test_a_whole_order_at_once_stays_proper(monkeypatch: Any, singly: int, mode: Any, cap: int | None) -> None:
    monkeypatch.setattr("tokenloom.methods.decoding.awrs._SINGLY", singly)
    races = 0
    for p, valid in ((PEAKED, {1, 3}), (PEAKED, {0, 2})):

        def program(draw: Any, p: Tensor = p, valid: set[int] = valid) -> tuple[int, float]:
            nonlocal races
            orders = Orders(draw, p)
            token, log_weight = awrs_token(p.log(), valid.__contains__, orders, tail=0.0, mode=mode, max_rejects=cap)
            races += orders.races
            return token, math.exp(log_weight)

        total = expectation(program)
        found = [total.get(t, 0.0) if t in valid else 0.0 for t in range(len(p))]
        assert found == pytest.approx(_mass(p, valid), abs=1e-9), (p, valid)
    assert races


def test_a_race_has_the_law_of_draws_without_replacement(monkeypatch: Any) -> None:
    monkeypatch.setattr("tokenloom.methods.decoding.awrs._SINGLY", 0)
    draw = RandomDraw(torch.Generator().manual_seed(0))
    n = 6000
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(n):
        order: list[int] = []
        awrs_token(PEAKED[:3].log(), lambda t, o=order: bool(o.append(t)), draw, mode="recursive", tail=0.0)  # type: ignore[misc, func-returns-value]
        seen[tuple(order)] = seen.get(tuple(order), 0) + 1
    p = (PEAKED[:3] / PEAKED[:3].sum()).tolist()
    expected = {(a, b, 3 - a - b): n * p[a] * p[b] / (1 - p[a]) for a in range(3) for b in range(3) if a != b}
    chi2 = sum((seen.get(o, 0) - e) ** 2 / e for o, e in expected.items())
    assert chi2 < 25.7, "5 degrees of freedom, p = 1e-4"


def test_a_long_search_draws_its_order_at_once() -> None:
    class Counted(RandomDraw):
        draws = 0

        def categorical(self, p: Tensor) -> int:
            self.draws += 1
            return super().categorical(p)

    draw = Counted(torch.Generator().manual_seed(0))
    asked: list[int] = []
    law = torch.full((3000,), 0.0)
    token, log_weight = awrs_token(law, lambda t: asked.append(t) or t == 2999, draw, mode="recursive")  # type: ignore[func-returns-value]
    assert (token, log_weight) == (2999, pytest.approx(0.0, abs=1e-9))
    assert len(asked) == len(set(asked)) > 100
    assert draw.draws < 50


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
