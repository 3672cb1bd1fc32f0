"""BAT under `generate`."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom.decode import shaper
from tokenloom.decode.basis_aware_truncation import clusters, main_directions
from tokenloom.draw import RandomDraw

pytest.importorskip("scipy")


@pytest.mark.parametrize("variables", [0, 20])
def test_it_draws_one_token_per_row_and_repeats(variables: int) -> None:
    model, ids = tiny_llama(), torch.tensor([[2, 2, 5], [8, 3, 9]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": True, "max_new_tokens": 5}
    found = []
    for _ in range(2):
        processor = shaper("basis-aware-truncation", model=model, constraints=4, variables=variables, epsilon=0.1)
        processor.draw = RandomDraw(torch.Generator().manual_seed(0))
        found.append(model.generate(ids, logits_processor=[processor], **given))
    assert torch.equal(*found)
    scores = torch.randn(3, 64)
    shaped = processor(torch.zeros(3, 1), scores)
    assert (shaped > -torch.inf).sum(-1).tolist() == [1, 1, 1]
    assert torch.equal(shaped.amax(-1), scores[shaped > -torch.inf])


def test_main_directions_keep_most_of_the_matrix() -> None:
    matrix = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    for count in (1, 3, 6, 9):
        found = main_directions(matrix, count)
        assert found.shape == (30, min(count, 6))
        expected = u[:, :count] * s[:count]
        torch.testing.assert_close(found @ found.T, expected @ expected.T)


def test_clusters_find_what_lies_together() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.cat(
        [center + 0.1 * torch.randn(20, 2, generator=g) for center in torch.tensor([[0.0, 9.0], [9.0, 0.0]])]
    )
    labels = clusters(rows.double(), 2)
    assert len(labels[:20].unique()) == len(labels[20:].unique()) == 1
    assert labels[0] != labels[20]
    assert torch.equal(clusters(rows, 40), clusters(rows, 40))


@pytest.mark.parametrize(
    ("parameters", "message"), [({"most": 0}, "at least one token"), ({"epsilon": 1.5}, "in .0, 1")]
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(parameters: dict[str, float], message: str) -> None:
    model = tiny_llama()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        shaper("basis-aware-truncation", model=model, **parameters)
    shaper("basis-aware-truncation", model=model, constraints=2, variables=8)
    assert torch.equal(torch.get_rng_state(), state)
