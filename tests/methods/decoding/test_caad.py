"""CAAD: retrieval and fusion."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.caad import caad

Z = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
KEYS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
VALUES = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 2.0], [8.0, 0.0, 0.0]], dtype=torch.float64)
EAST = torch.tensor([[5.0, 0.0]], dtype=torch.float64)


def test_worked_numbers() -> None:
    # Cosines 1, 0, -1; the two best have a mean of 1/2 and weights of e, 1 to 1 + e at temperature 1.
    w = math.e / (1 + math.e)
    found = caad(Z, EAST, KEYS, VALUES, alpha=2.0, top_n=2, temperature=1.0)
    torch.testing.assert_close(found, Z + torch.tensor([[0.0, w * 4, (1 - w) * 2]], dtype=torch.float64))
    # Above a threshold of .5 only the first is left.
    found = caad(Z, EAST, KEYS, VALUES, alpha=2.0, top_n=2, threshold=0.5)
    torch.testing.assert_close(found, Z + torch.tensor([[0.0, 8.0, 0.0]], dtype=torch.float64))


def test_an_empty_store_or_no_alpha_changes_nothing() -> None:
    assert torch.equal(caad(Z, EAST, KEYS[:0], VALUES[:0]), Z)
    assert torch.equal(caad(Z, EAST, KEYS, VALUES, alpha=0.0), Z)


def test_unrelated_contexts_change_nothing() -> None:
    north = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    assert torch.equal(caad(Z, north, KEYS[:1], VALUES[:1]), Z)
    assert torch.equal(caad(Z, north, KEYS[1:2], VALUES[1:2], threshold=-1.0), Z)


def test_an_identical_context_decides_in_the_limit() -> None:
    assert int(caad(Z, EAST, KEYS, VALUES, alpha=1e6, top_n=1).argmax()) == int(VALUES[0].argmax())


def test_the_order_of_the_store_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    keys, values, contexts, scores = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((20, 6), (20, 9), (4, 6), (4, 9))
    )
    order = torch.randperm(20, generator=g)
    torch.testing.assert_close(caad(scores, contexts, keys[order], values[order]), caad(scores, contexts, keys, values))
    rows = torch.cat([caad(s[None], c[None], keys, values) for s, c in zip(scores, contexts, strict=True)])
    torch.testing.assert_close(caad(scores, contexts, keys, values), rows)


@pytest.mark.parametrize("options", [{"top_n": 0}, {"temperature": 0.0}])
def test_what_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="caad: top_n must be"):
        caad(Z, EAST, KEYS, VALUES, **options)  # type: ignore[arg-type]
