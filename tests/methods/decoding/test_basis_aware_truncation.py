"""BAT: which tokens are kept, and the law of what is drawn; programs are solved by HiGHS."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from tokenloom.decode.basis_aware_truncation import feasible
from tokenloom.draw import law_of
from tokenloom.methods.decoding.basis_aware_truncation import (
    Program,
    base_threshold,
    basis_aware_truncation,
    must_have_mass,
    program,
)
from tokenloom.methods.decoding.eta_sampling import eta_sampling

pytest.importorskip("scipy")
P = torch.tensor([0.5, 0.46, 0.04], dtype=torch.float64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_worked_numbers() -> None:
    # The mass of token 2 could move to token 1: .5 <= .46 / .9 = .5111. With twice its weight it would need .54.
    assert not must_have_mass(P, column(0, 1, 1), 0.1, 2, feasible)
    assert must_have_mass(P, column(0, 1, 2), 0.1, 2, feasible)


def test_without_a_basis_it_is_the_threshold() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        probs = (torch.randn(8, generator=g, dtype=torch.float64) * 2).softmax(0)
        for threshold in (0.02, 0.1, 0.3):
            keep = [must_have_mass(probs, torch.zeros(8, 0), threshold, v, feasible) for v in range(8)]
            assert keep == (probs >= threshold).tolist()


def test_a_full_basis_keeps_every_token_with_mass() -> None:
    probs = torch.tensor([0.5, 0.3, 0.1999, 1e-4, 0.0], dtype=torch.float64)
    keep = [must_have_mass(probs, torch.eye(5), 0.2, v, feasible) for v in range(5)]
    assert keep == [True, True, True, True, False]


def test_more_constraints_never_drop_more() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        probs = (torch.randn(9, generator=g, dtype=torch.float64) * 1.5).softmax(0)
        basis = torch.randn(9, 6, generator=g, dtype=torch.float64)
        sets = [[must_have_mass(probs, basis[:, :c], 0.2, v, feasible) for v in range(9)] for c in (0, 1, 3, 6)]
        assert all(a <= b for few, many in pairwise(sets) for a, b in zip(few, many, strict=True))
        with_negatives = [must_have_mass(probs, basis, 0.2, v, feasible, nonneg=False) for v in range(9)]
        assert all(a <= b for a, b in zip(with_negatives, sets[-1], strict=True))


def test_a_found_program_is_fulfilled() -> None:
    made = program(P, column(0, 1, 1), 0.1, 2)
    shares = torch.tensor([1.0, 0.5 / 0.46], dtype=torch.float64)
    torch.testing.assert_close(made.matrix @ shares, made.target)
    assert (made.lower, made.upper) == (0.0, pytest.approx(1 / 0.9))
    assert bool((shares <= made.upper).all())


def test_fused_tokens_move_together() -> None:
    # Tokens 0 and 1 alone could give back what 3 takes along; fused with 2 in shares of their masses they cannot.
    probs = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64)
    basis = column(-1.0, 0.0, 1.0, 1.2)
    apart = program(probs, basis, 0.4, 3)
    assert apart.matrix.shape == (2, 3)
    assert feasible(apart)
    fused = program(probs, basis, 0.4, 3, torch.zeros(4, dtype=torch.int64))
    # The nearest token, 2, is left alone; the others are one unknown of mass .6 and row -.3.
    torch.testing.assert_close(fused.matrix, torch.tensor([[0.3, -0.3], [0.3, 0.6]], dtype=torch.float64))
    torch.testing.assert_close(fused.target, apart.target)
    own = program(probs, basis, 0.4, 3, torch.arange(4))
    assert feasible(own)


def test_fusing_never_drops_more() -> None:
    g = torch.Generator().manual_seed(2)
    dropped = 0
    for _ in range(10):
        probs = (torch.randn(12, generator=g, dtype=torch.float64) * 1.5).softmax(0)
        basis = torch.randn(12, 2, generator=g, dtype=torch.float64)
        whole = [must_have_mass(probs, basis, 0.2, v, feasible) for v in range(12)]
        fused = [must_have_mass(probs, basis, 0.2, v, feasible, torch.arange(12) % 3) for v in range(12)]
        assert all(a <= b for a, b in zip(whole, fused, strict=True))
        dropped += fused.count(False)
    assert dropped > 0


def test_the_law_is_the_models_on_what_is_kept() -> None:
    probs = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08], dtype=torch.float64)
    basis = column(0.0, 1.0, 2.0, 2.5, 0.3)
    threshold = base_threshold(probs, base="epsilon", epsilon=0.2)
    keep = torch.tensor([must_have_mass(probs, basis, threshold, v, feasible) for v in range(5)])
    assert 2 < int(keep.sum()) < 5
    law = law_of(lambda draw: basis_aware_truncation(probs, basis, feasible, draw, base="epsilon", epsilon=0.2))
    expected = probs * keep / (probs * keep).sum()
    found = torch.tensor([law.get(v, 0.0) for v in range(5)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_after_too_many_rejections_the_most_probable_is_taken() -> None:
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    anything = torch.zeros(4, 0)
    law = law_of(lambda d: basis_aware_truncation(probs, anything, feasible, d, base="epsilon", epsilon=0.35, most=1))
    assert law == pytest.approx({0: 1.0})
    law = law_of(lambda d: basis_aware_truncation(probs, anything, feasible, d, base="epsilon", epsilon=0.25, most=1))
    assert law == pytest.approx({0: 0.7, 1: 0.3})


@pytest.mark.parametrize(("base", "value"), [("eta", 0.117915), ("epsilon", 0.2), ("top-p", 0.15)])
def test_thresholds_of_the_base_rules(base: Literal["eta", "epsilon", "top-p"], value: float) -> None:
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    assert base_threshold(probs, base=base, epsilon=0.2, p=0.8) == pytest.approx(value, abs=1e-6)


def test_a_threshold_above_all_leaves_the_most_probable() -> None:
    assert base_threshold(P, base="epsilon", epsilon=0.9) == 0.5
    law = law_of(lambda d: basis_aware_truncation(P, torch.zeros(3, 0), feasible, d, base="epsilon", epsilon=0.9))
    assert law == pytest.approx({0: 1.0})
    certain = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert law_of(lambda d: basis_aware_truncation(certain, torch.zeros(2, 0), feasible, d)) == {0: 1.0}


def test_without_a_basis_eta_is_eta_sampling() -> None:
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    law = law_of(lambda d: basis_aware_truncation(probs, torch.zeros(5, 0), feasible, d, epsilon=0.2))
    keep = eta_sampling(probs[None], epsilon=0.2)[0]
    assert law == pytest.approx({v: float(probs[v] / probs[keep].sum()) for v in range(5) if keep[v]})


def test_solver_failures_keep_the_token() -> None:
    def fails(_: Program) -> bool:
        return False

    assert must_have_mass(P, column(0, 1, 1), 0.1, 2, fails)


def test_at_least_one_draw_is_asked_for() -> None:
    with pytest.raises(ValueError, match="most = 0"):
        law_of(lambda d: basis_aware_truncation(P, torch.zeros(3, 0), feasible, d, most=0))
