"""Speculative sampling: the target's law for any draft, worked numbers, limits."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoding.drafting import CHAIN, P, Q, assert_lossless, outcome_at_a_node
from tokenloom.draw import law_of
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree, residual
from tokenloom.methods.decoding.speculative_sampling import acceptance, expected_tokens, greedy, speculative_sampling


def test_worked_numbers() -> None:
    assert float(acceptance(P, Q)) == pytest.approx(0.7, abs=1e-12)
    assert float(acceptance(P, Q)) == pytest.approx(1 - 0.5 * float((P - Q).abs().sum()), abs=1e-12)
    torch.testing.assert_close(residual(P, Q), torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert expected_tokens(0.7, drafts=4) == pytest.approx(2.7731, abs=1e-12)
    assert expected_tokens(1.0, drafts=4) == 5
    assert expected_tokens(0.0, drafts=4) == 1
    token, accepted = outcome_at_a_node(speculative_sampling, 1, "independent")
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_has_the_targets_law(seed: int) -> None:
    assert 1 < assert_lossless(speculative_sampling, CHAIN, "independent", seed=seed) < 3


def test_an_equal_draft_is_always_accepted() -> None:
    token, accepted = outcome_at_a_node(speculative_sampling, 1, "independent", p=P, q=P)
    torch.testing.assert_close(token, P, rtol=0, atol=1e-12)
    assert accepted == 1
    # Rounding may leave nothing of the residual; it is then never asked for, and still a law.
    assert torch.equal(residual(P, P), P)


def test_disjoint_laws_are_always_rejected() -> None:
    p, q = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])
    assert law_of(lambda d: speculative_sampling(DraftTree([2], [ROOT], {ROOT: q}), torch.stack([p, p]), d).bonus) == {
        0: 1.0
    }


def test_half_precision_laws_are_compared_in_float32() -> None:
    p, q = P.bfloat16(), Q.bfloat16()
    token, accepted = outcome_at_a_node(speculative_sampling, 1, "independent", p=p.float(), q=q.float())
    torch.testing.assert_close(token, p.float() / p.float().sum(), rtol=0, atol=2e-3)
    assert accepted == pytest.approx(float(acceptance(p.float(), q.float())), abs=2e-3)


def test_greedy_follows_the_best_tokens_through_repeated_siblings() -> None:
    tree = DraftTree([5, 5, 7, 8], [ROOT, ROOT, 1, 2])
    # Node 0 and 1 hold the same token, and only below the second one it goes on.
    path, bonus = greedy(tree, [5, 7, 7, 8, 9])
    assert [tree.tokens[node] for node in path] == [5, 7, 8]
    assert bonus == 9
    assert greedy(tree, [6, 0, 0, 0, 0]) == ([], 6)
    assert greedy(DraftTree([], []), [3]) == ([], 3)


def test_what_cannot_be_is_refused() -> None:
    laws = torch.stack([P] * 3)
    with pytest.raises(ValueError, match="one chain"):
        speculative_sampling(DraftTree([0, 1], [ROOT, ROOT], {ROOT: Q}), laws, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt-lookup/verify"):
        speculative_sampling(DraftTree([0], [ROOT]), laws, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parents come before"):
        DraftTree([0, 1], [1, ROOT])
    with pytest.raises(ValueError, match="2 tokens have 1 parents"):
        DraftTree([0, 1], [ROOT])
    with pytest.raises(ValueError, match="rate"):
        expected_tokens(1.5)
