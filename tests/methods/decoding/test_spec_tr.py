"""SpecTr: worked numbers of K-SEQ, its bounds, the target's law at a node and along sequences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.methods.decoding.drafting import CHAIN, TWO_CHAINS, P, Q, assert_lossless, outcome_at_a_node
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.spec_tr import division_factor, k_seq_acceptance, k_seq_residual, spec_tr
from tokenloom.methods.decoding.speculative_sampling import acceptance, speculative_sampling
from tokenloom.methods.decoding.two_step_multi_draft import optimal_acceptance


def test_worked_numbers() -> None:
    rho = division_factor(P, Q, count=2)
    assert rho == pytest.approx(1.456776, abs=1e-6)
    assert float(torch.minimum(Q, P / rho).sum()) == pytest.approx(0.543224, abs=1e-6)
    assert k_seq_acceptance(P, Q, count=2) == pytest.approx(0.791355, abs=1e-6)
    torch.testing.assert_close(k_seq_residual(P, Q, rho, count=2), torch.tensor([1.0, 0, 0], dtype=torch.float64))
    token, accepted = outcome_at_a_node(spec_tr, 2, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-9)
    assert accepted == pytest.approx(k_seq_acceptance(P, Q, count=2), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_have_the_targets_law(seed: int) -> None:
    assert_lossless(spec_tr, TWO_CHAINS, "independent", seed=seed)


def test_three_drafts() -> None:
    assert_lossless(spec_tr, Shape([ROOT] * 3, [0, 1, 2]), "independent")


def test_one_draft_is_speculative_sampling() -> None:
    assert division_factor(P, Q, count=1) == 1
    assert assert_lossless(spec_tr, CHAIN, "independent") == pytest.approx(
        assert_lossless(speculative_sampling, CHAIN, "independent"), abs=1e-12
    )


def test_acceptance_grows_with_drafts_and_is_near_the_best() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        p, q = torch.rand(2, 6, generator=g, dtype=torch.float64).pow(3).add(1e-3)
        p, q = p / p.sum(), q / q.sum()
        found = [k_seq_acceptance(p, q, count=k) for k in range(1, 7)]
        assert found[0] == pytest.approx(float(acceptance(p, q)), abs=1e-12)
        assert all(b >= a - 1e-12 for a, b in pairwise(found))
        for k, value in enumerate(found, 1):
            best = float(optimal_acceptance(p, q, count=k))
            assert (1 - 1 / math.e) * best - 1e-12 <= value <= best + 1e-12
            rho = division_factor(p, q, count=k)
            assert 1 <= rho <= k
            # The residual is a law: nothing of it is below 0.
            beta = float(torch.minimum(q, p / rho).sum())
            assert value <= rho * beta + 1e-12


def test_edges() -> None:
    token, accepted = outcome_at_a_node(spec_tr, 2, "independent", p=P, q=P)
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == 1
    p, q = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    token, accepted = outcome_at_a_node(spec_tr, 2, "independent", p=p, q=q)
    assert torch.equal(token, p)
    assert accepted == 0
    with pytest.raises(ValueError, match="at least 1"):
        division_factor(P, Q, count=0)
    with pytest.raises(ValueError, match="came without"):
        spec_tr(DraftTree([0], [ROOT]), torch.stack([P, P]), None)  # type: ignore[arg-type]
