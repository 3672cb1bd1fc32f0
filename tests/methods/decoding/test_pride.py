"""PriDe: an exact product model gives its prior back; limits, invariances and RStd by hand."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.pride import (
    cyclic_orders,
    debias,
    global_prior,
    permuted_mean,
    prior_of,
    recall_std,
)

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
CONTENTS = torch.tensor([0.1, 0.2, 0.6, 0.1], dtype=torch.float64)


def product_model(prior: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
    """Rows [n, n]: letters' probabilities for each cyclic order."""
    rows = prior * contents[torch.tensor(cyclic_orders(len(prior)))]
    return rows / rows.sum(1, keepdim=True)


def test_the_prior_and_the_contents_are_recovered() -> None:
    rows = product_model(PRIOR, CONTENTS)
    prior = prior_of(rows)
    torch.testing.assert_close(prior, PRIOR, rtol=0, atol=1e-8)
    torch.testing.assert_close(debias(rows[:1], prior).softmax(-1)[0], CONTENTS, rtol=0, atol=1e-8)


def test_permuted_samples_average_contents_over_letters() -> None:
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    # Order 1 shows contents 1, 2, 0 and order 2 shows 2, 0, 1.
    expected = torch.tensor([0.7 + 0.1 + 0.3, 0.2 + 0.6 + 0.2, 0.1 + 0.3 + 0.5], dtype=torch.float64) / 3
    torch.testing.assert_close(permuted_mean(rows), expected)


def test_an_even_prior_changes_nothing() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    found = debias(probs, torch.full((3,), 1 / 3, dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(found, probs, rtol=0, atol=1e-9)


def test_the_scale_of_a_row_does_not_matter() -> None:
    rows, scale = product_model(PRIOR, CONTENTS), torch.tensor([[1.0], [0.01], [7.0], [0.3]], dtype=torch.float64)
    torch.testing.assert_close(prior_of(rows * scale), prior_of(rows))
    torch.testing.assert_close(permuted_mean(rows * scale), permuted_mean(rows))
    assert debias(rows * 0.2, PRIOR).argmax(-1).tolist() == debias(rows, PRIOR).argmax(-1).tolist()


def test_impossible_letters_stay_finite() -> None:
    prior = prior_of(torch.eye(3))
    assert bool(prior.isfinite().all())
    assert bool(debias(torch.eye(3), torch.tensor([1.0, 0.0, 0.0])).isfinite().all())


def test_global_prior_is_the_mean() -> None:
    found = global_prior([torch.tensor([0.2, 0.8]), torch.tensor([0.6, 0.4])])
    torch.testing.assert_close(found, torch.tensor([0.4, 0.6]))


def test_rstd_by_hand() -> None:
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 1, 0, 0, -1])
    # Recalls 1, 1/2, 0: population deviation sqrt(1/6).
    assert recall_std(predicted, truth, 3) == pytest.approx(100 * (1 / 6) ** 0.5, abs=1e-9)
    assert recall_std(predicted, truth, 4) == recall_std(predicted, truth, 3)
    assert recall_std(truth, truth, 3) == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="one row for each cyclic order"):
        prior_of(torch.ones(3, 4))
    with pytest.raises(ValueError, match="some mass"):
        prior_of(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="5 %"):
        global_prior([])
    with pytest.raises(ValueError, match="whose truth"):
        recall_std(torch.tensor([0]), torch.tensor([-1]), 2)
