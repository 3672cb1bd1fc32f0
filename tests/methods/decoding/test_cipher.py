"""CIPHER's rules: expectations, the limit of certainty, read-out, the partial ablation."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.cipher import expected_embedding, nearest, partial_law

TABLE = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_expected_embeddings_worked_by_hand() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    law = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float64)
    close(expected_embedding(law, table), [[1.5, 1.5], [0.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_certainty_says_the_token_bit_by_bit(dtype: torch.dtype) -> None:
    assert torch.equal(expected_embedding(torch.eye(12), TABLE.to(dtype)), TABLE.to(dtype))


def test_every_row_is_nearest_to_itself_whatever_its_length() -> None:
    directions = torch.nn.functional.normalize(TABLE, dim=-1)
    assert nearest(TABLE, directions).tolist() == list(range(12))
    assert nearest(TABLE * torch.linspace(0.1, 9, 12)[:, None], directions).tolist() == list(range(12))
    assert nearest(TABLE[3:4] + 0.01, torch.cat((directions, directions))).tolist() == [3]
    said = TABLE[:4] + TABLE[4:8]
    by_distance = torch.cdist(torch.nn.functional.normalize(said, dim=-1), directions).argmin(-1)
    assert torch.equal(nearest(said, directions), by_distance)


def test_the_partial_form_says_tokens_where_told() -> None:
    law = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.5, 0.1]], dtype=torch.float64)
    token = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    close(partial_law(law), torch.stack((token[0], law[1])))
    close(partial_law(law, tokens_when="uncertain"), torch.stack((law[0], token[1])))
    close(partial_law(law, threshold=2.0), law)
    close(partial_law(law, threshold=0.0), token)
