"""Contrastive decoding: the formula."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoding.truncation import random_scores
from tokenloom.methods.decoding.contrastive_decoding import contrastive_decoding
from tokenloom.methods.decoding.min_p import min_p

E = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
A = torch.tensor([[0.6, 0.2, 0.1, 0.1]], dtype=torch.float64).log()
INF = float("inf")


def test_worked_numbers() -> None:
    expected = torch.tensor([[-0.182322, 0.405465, 0.405465, -0.693147]], dtype=torch.float64)
    torch.testing.assert_close(contrastive_decoding(E, A), expected, rtol=0, atol=1e-6)
    # Raw scores, whatever was added to them, are not what the original form compares.
    torch.testing.assert_close(contrastive_decoding(E + 3, A - 2), expected, rtol=0, atol=1e-6)
    # .5 x .4 = .2 is the least plausible probability.
    assert contrastive_decoding(E, A, alpha=0.4)[0, 2:].tolist() == [-INF, -INF]


def test_the_later_form_extrapolates_raw_scores() -> None:
    found = contrastive_decoding(E + 3, A - 2, form="later", beta=0.5)
    torch.testing.assert_close(found, 1.5 * (E + 3) - 0.5 * (A - 2))
    assert contrastive_decoding(E, A, form="later", alpha=0.4)[0, 2:].tolist() == [-INF, -INF]


def test_one_model_twice_has_nothing_to_say() -> None:
    scores = random_scores()
    plausible = min_p(scores.softmax(-1), min_p=0.1)
    original = contrastive_decoding(scores, scores)
    assert bool((original[plausible].abs() < 1e-12).all())
    assert bool((original[~plausible] == -INF).all())
    later = contrastive_decoding(scores, scores, form="later")
    torch.testing.assert_close(later, scores.masked_fill(~plausible, -INF))


def test_the_amateurs_temperature_divides_its_scores() -> None:
    torch.testing.assert_close(contrastive_decoding(E, A, amateur_temperature=2.0), contrastive_decoding(E, A / 2))


def test_what_the_amateur_rules_out_stays_finite() -> None:
    found = contrastive_decoding(E, A.index_fill(1, torch.tensor([1]), -INF))
    assert bool(found.isfinite().all())
    assert int(found.argmax()) == 1


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"beta": -1.0}, {"amateur_temperature": 0.0}])
def test_what_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="contrastive-decoding: "):
        contrastive_decoding(E, A, **options)  # type: ignore[arg-type]
