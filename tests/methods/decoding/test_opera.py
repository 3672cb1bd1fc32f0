"""OPERA's formulas: the sheet's block, products in logs, penalties early and late, where to go back to."""

from __future__ import annotations

import math

import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.opera import candidate_scores, over_trust, penalty, return_to


def test_the_block_of_the_sheet() -> None:
    block = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    log_trust, column = over_trust(block)
    close(log_trust.exp(), 1.25e-4)
    assert column == 0
    # Without the first column the second is left: phi = 2.5e-6.
    log_trust, column = over_trust(torch.tensor([[0.0, 9.0], [0.5, 0.5]], dtype=torch.float64))
    close(log_trust.exp(), 2.5e-6)
    assert column == 1


def test_products_over_columns() -> None:
    block = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_trust, column = over_trust(block, scale=7.0)
    for b in range(3):
        phi = [1e-7 * math.prod(7.0 * float(block[b, i, c]) for i in range(c, 6)) for c in range(6)]
        close(log_trust[b].exp(), max(phi))
        assert column[b] == phi.index(max(phi))


def test_long_responses_neither_overflow_nor_vanish() -> None:
    block = torch.full((900, 900), 0.9, dtype=torch.float64).tril()
    log_trust, column = over_trust(block)
    close(log_trust, 900 * math.log(45) - math.log(1e7))
    assert column == 0
    found = penalty(log_trust, torch.tensor(0.5), 899)
    assert bool(found.isfinite())
    assert float(found) > 1e200


def test_the_first_words_are_paid_for_looking_at_the_span() -> None:
    log_trust, seen = torch.tensor([math.log(2.0), -math.inf], dtype=torch.float64), torch.tensor([0.25, 0.5]).double()
    close(penalty(log_trust, seen, 9), [-0.25, -0.5])
    close(penalty(log_trust, seen, 10), [2.0, 0.0])


def test_candidates_less_their_penalties() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0]], dtype=torch.float64)
    found = candidate_scores(scores, torch.tensor([[1, 2]]), torch.tensor([[2.0, 0.5]]).double(), alpha=2.0)
    close(found, [[-999.0, 1.0, 2.0, -999.0]])
    found = candidate_scores(scores, torch.tensor([[1, 2]]), torch.tensor([[1e9, 2e9]]).double())
    close(found, [[3 - 2e9 - 999, 5 - 1e9, 3 - 2e9, 3 - 2e9 - 999]], 1e-15)
    close(candidate_scores(scores, torch.arange(4)[None], torch.ones(1, 4), alpha=0.0), scores)


def test_where_to_go_back_to() -> None:
    twice = [[3, 12, 12, 15], [12, 15, 12, 15]]
    assert return_to(twice, {}, patience=1) == 12
    assert return_to(twice, {}, patience=2) is None
    assert return_to([[12, 12, 12], [12, 15, 15]], {}, patience=1) is None
    assert return_to([[9, 9, 9]], {}, patience=1) is None
    assert return_to([[12, 12, 15, 15, 15]], {}, patience=1) == 15
    assert return_to(twice, {12: 4}, patience=1) == 12
    assert return_to(twice, {12: 5}, patience=1) == 11
    assert return_to(twice, {12: 5, 11: 5}, patience=1) == 10
    assert return_to(twice, {12: 5, 11: 5, 10: 5}, patience=1) is None
    assert return_to([], {}) is None
