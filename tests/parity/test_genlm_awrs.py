"""AWRS against genlm-control's own code, order by order, where it is installed.

It may live in an environment of its own that also sees this one: /path/to/it/bin/python -m pytest this_file.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.draw import law_of
from tokenloom.methods.decoding import awrs
from tokenloom.methods.decoding.smc import systematic

pytest.importorskip("genlm.control", reason="python -m pip install genlm-control, in an environment of its own")
P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
VALIDS = [{1, 3, 4}, {0}, {4}, {0, 1, 2, 3, 4}, set(), {2, 3}]


class InOrder:
    """Draws tokens by a given order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.order = order

    def categorical(self, p: Tensor) -> int:
        return next(t for t in self.order if float(p[t]) > 0)

    def bernoulli(self, a: float) -> bool:
        raise AssertionError("not drawn here")


class Counts:
    """The other side's generator: geometric numbers from a script."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = iter(counts)

    def geometric(self, p: float) -> int:
        return next(self.counts) + 1


def _keys(order: tuple[int, ...]) -> Any:
    rank = torch.tensor([-float(order.index(t)) for t in range(len(order))], dtype=torch.float64)
    return lambda logps: torch.where(logps > -torch.inf, rank, -torch.inf)


def _theirs(kind: str, order: tuple[int, ...], valid: set[int], cap: float, **more: Any) -> tuple[int, float]:
    from genlm.control.sampler import token as official

    async def accept(token: int) -> bool:
        return token in valid

    call = {
        "recursive": official.recursive_awrs,
        "geometric": official.geometric_awrs,
        "improper": official.improper_sample,
    }
    token, weight, _ = asyncio.run(
        call[kind](
            logps=P.log().clone(), toks=list(range(5)), accept=accept, make_keys=_keys(order), max_rejects=cap, **more
        )
    )
    return int(token), float(weight)


def _same(ours: tuple[int, float], theirs: tuple[int, float]) -> None:
    if theirs[1] == -math.inf:
        assert ours[1] == -math.inf  # which rejected token comes along does not matter
    else:
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-9)


@pytest.mark.parametrize("cap", [None, 2, 3])
@pytest.mark.parametrize("valid", VALIDS)
@pytest.mark.parametrize("kind", ["recursive", "improper"])
def test_every_order(kind: Any, valid: set[int], cap: int | None) -> None:
    for order in itertools.permutations(range(5)):
        ours = awrs.awrs_token(P.log(), lambda t: t in valid, InOrder(order), mode=kind, max_rejects=cap)
        _same(ours, _theirs(kind, order, valid, math.inf if cap is None else cap))


@pytest.mark.parametrize("cap", [None, 2, 5])
@pytest.mark.parametrize("accepts", [2, 3])
@pytest.mark.parametrize("valid", VALIDS)
def test_geometric_with_scripted_counts(valid: set[int], accepts: int, cap: int | None, monkeypatch: Any) -> None:
    for script in ([0] * 20, [1, 0, 2, 0, 1] * 5, [3, 1] * 10):
        for order in itertools.permutations(range(5)):
            counts = iter(script)
            monkeypatch.setattr(awrs, "_repeats", lambda left, draw, most, counts=counts: next(counts))
            ours = awrs.awrs_token(
                P.log(),
                lambda t: t in valid,
                InOrder(order),
                mode="geometric",
                max_accepts=accepts,
                max_rejects=cap,
                tail=0.0,
            )
            more = {"rng": Counts(script), "max_accepts": accepts}
            _same(ours, _theirs("geometric", order, valid, math.inf if cap is None else cap, **more))


def test_systematic_resampling(monkeypatch: Any) -> None:
    import numpy as np
    from genlm.control.sampler.resampling import systematic_resample

    weights = torch.tensor([0.45, 0.0, 0.25, 0.3], dtype=torch.float64)
    law = law_of(lambda draw: tuple(systematic(weights.log(), draw)))
    seen: dict[tuple[int, ...], float] = {}
    points = 2000
    for n in range(points):
        monkeypatch.setattr(np.random, "random", lambda n=n: (n + 0.5) / points)
        children = tuple(int(i) for i in systematic_resample(weights.numpy()))
        seen[children] = seen.get(children, 0.0) + 1 / points
    assert set(seen) == set(law)
    for children, share in seen.items():
        assert law[children] == pytest.approx(share, abs=2 / points)


def test_its_automaton_as_a_constraint_allows_what_llguidances_allows() -> None:
    pytest.importorskip("llguidance")
    from genlm.control import BoolFSA

    from decode.tokenizers_at_hand import byte_level
    from tokenloom.decode.constraints import PotentialConstraint, RegexConstraint

    tokenizer = byte_level()
    theirs = PotentialConstraint(tokenizer, BoolFSA.from_regex("a(ba)*|x[0-9]{2}"))
    ours = RegexConstraint(tokenizer, pattern="a(ba)*|x[0-9]{2}")
    prefix: list[int] = []
    for text in ("", "a", "aba", "x", "x1", "x12"):
        prefix = tokenizer.encode(text, add_special_tokens=False) if text else []
        for token in range(len(tokenizer)):
            assert theirs.accept(prefix, token) == ours.accept(prefix, token), (text, token)
