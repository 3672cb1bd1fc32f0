"""Every batch moves the parameters equally far, however its loss is scaled and cut into updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.lab.optimizer import ScaleFree


def gradients(batches: int, updates: int, *, same: bool = False) -> list[list[Tensor]]:
    """Standard normal gradients of 2,000 entries; with `same`, those of a batch are equal."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        drawn = [torch.randn(2000, generator=generator, dtype=torch.float64) for _ in range(updates)]
        found.append([drawn[0]] * updates if same else drawn)
    return found


def moves(batches: list[list[Tensor]], length: float = 0.5, scale: float = 1.0) -> list[Tensor]:
    """How each batch moves the parameters."""
    parameter = torch.zeros(2000, dtype=torch.float64)
    optimizer = ScaleFree([parameter], length)
    found = []
    for batch in batches:
        before = parameter.clone()
        optimizer.begin(len(batch))
        for gradient in batch:
            optimizer.step([scale * gradient])
        found.append(parameter - before)
    return found


def test_the_scale_of_the_loss_does_not_matter_and_the_first_batch_has_the_length() -> None:
    plain, tiny = moves(gradients(6, 1)), moves(gradients(6, 1), scale=1e-6)
    for a, b in zip(plain, tiny, strict=True):
        torch.testing.assert_close(a, b)
    assert float(plain[0].norm()) == pytest.approx(0.5)


@pytest.mark.parametrize("updates", [1, 2, 8])
def test_a_batch_moves_equally_far_however_many_updates_it_has(updates: int) -> None:
    sizes = [float(m.norm()) for m in moves(gradients(5, updates))]
    # |g|^2 of 2,000 normals varies by 3 %, and sums of independent ones are as far apart from orthogonal.
    assert sizes == pytest.approx([0.5] * 5, rel=0.1)


def test_epochs_over_the_same_batch_go_no_further_once_that_is_known() -> None:
    sizes = [float(m.norm()) for m in moves(gradients(12, 4, same=True))]
    # The first batch is taken for four independent gradients, until their sum is known: |4 g| and not |2 g|.
    assert 0.5 < sizes[0] < 1.0
    assert sizes[-1] == pytest.approx(0.5, rel=0.1)


def test_batches_without_gradient_do_not_move_and_do_not_count() -> None:
    real = gradients(3, 1)
    nothing = [torch.zeros(2000, dtype=torch.float64)]
    with_gaps = moves([nothing, real[0], nothing, real[1], real[2]])
    assert not with_gaps[0].any()
    assert not with_gaps[2].any()
    for a, b in zip([with_gaps[1], *with_gaps[3:]], moves(real), strict=True):
        torch.testing.assert_close(a, b)


def test_several_parameters_share_one_scale() -> None:
    first, second = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    optimizer = ScaleFree([first, second], 1.0)
    optimizer.begin(1)
    optimizer.step([torch.tensor([3.0, 0, 0], dtype=torch.float64), torch.tensor([0, 4.0], dtype=torch.float64)])
    assert first.tolist() == pytest.approx([-0.6, 0, 0])
    assert second.tolist() == pytest.approx([0, -0.8])
