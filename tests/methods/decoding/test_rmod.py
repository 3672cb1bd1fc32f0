"""RMOD's rules: worst-case weights, the block they choose, the loss of the values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.rmod import best_block, block_law, robust_weights, value_loss


def table(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


SYMMETRIC = table((1, 0), (0, 1), (0.6, 0.6))
LOPSIDED = table((3, 0), (2, 1), (0, 0.5))


def test_symmetric_objectives_weigh_the_same() -> None:
    weights = robust_weights(SYMMETRIC)
    torch.testing.assert_close(weights, table((0.5, 0.5))[0], rtol=0, atol=1e-12)
    assert best_block(SYMMETRIC, weights) == 2


def test_the_worse_objective_gets_the_weight() -> None:
    weights = robust_weights(LOPSIDED)
    torch.testing.assert_close(weights, table((0.0306, 0.9694))[0], rtol=0, atol=5e-5)
    assert best_block(LOPSIDED, weights) == 1
    torch.testing.assert_close(
        robust_weights(LOPSIDED, iterations=20_000), table((0.0011, 0.9989))[0], rtol=0, atol=5e-5
    )
    # Under even weights the first two blocks are equally good.
    assert best_block(LOPSIDED, table((0.5, 0.5))[0]) == 0
    assert robust_weights(LOPSIDED.float()).dtype == robust_weights(LOPSIDED.bfloat16()).dtype == torch.float32


def test_one_objective_is_ordinary_controlled_decoding() -> None:
    values = table((0.3,), (0.9,), (0.9,), (-1.0,))
    weights = robust_weights(values)
    assert weights.tolist() == [1.0]
    assert best_block(values, weights) == 1
    torch.testing.assert_close(block_law(values, weights, lam=2.0), (2 * values[:, 0]).softmax(0))


def test_small_lam_weighs_the_objective_of_the_smallest_mean() -> None:
    values = table((5, 2, 1), (-4.5, 1.6, 3))  # means .25, 1.8, 2
    lam = 1e-4
    weights = robust_weights(values, lam=lam, eta=1 / lam, iterations=4000)
    assert weights[0] > 0.95


def test_the_weights_minimize_the_log_mean_exp() -> None:
    weights = robust_weights(SYMMETRIC * 2 + table((0.4, 0)), iterations=20_000)
    values = SYMMETRIC * 2 + table((0.4, 0))
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    goal = (grid[:, None] * values[:, 0] + (1 - grid)[:, None] * values[:, 1]).logsumexp(-1)
    assert float(weights[0]) == pytest.approx(float(grid[goal.argmin()]), abs=1e-3)


def test_large_values_do_not_overflow() -> None:
    weights = robust_weights((LOPSIDED * 1e4).float())
    assert weights.isfinite().all()
    assert weights[1] > 0.9
    # The form taken there sees differences only, and has another tenth iterate.
    found = robust_weights(LOPSIDED + 1000)
    torch.testing.assert_close(found, table((0.0973, 0.9027))[0], rtol=0, atol=5e-5)
    for bad, match in ((table((1, float("inf"))), "finite"), (table((1, 2))[0], "blocks x objectives")):
        with pytest.raises(ValueError, match=match):
            robust_weights(bad)
    for settings in ({"lam": 0.0}, {"eta": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="above 0"):
            robust_weights(SYMMETRIC, **settings)  # type: ignore[arg-type]


def test_worked_losses() -> None:
    values = torch.tensor([[[1.0], [2.0], [9.0]]], dtype=torch.float64, requires_grad=True)
    rewards, mask = torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([[True, True, False]])
    assert value_loss(values, rewards, mask).item() == 2.5  # (4 + 1) / 2
    assert value_loss(values, rewards, mask, target="td").item() == 1.0  # (2 - 1)^2 and (3 - 2)^2
    loss = value_loss(values, rewards, mask, target="td")
    loss.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    # No gradient flows into what is aimed at.
    assert values.grad.flatten().tolist() == [-1.0, -1.0, 0.0]


def test_hostile_values_off_the_mask_do_not_leak() -> None:
    values = torch.tensor([[[1.0, 0.0], [float("nan"), float("inf")]]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    for target in ("final", "td"):
        values.grad = None
        loss = value_loss(values, torch.tensor([[2.0, 2.0]]), mask, target=target)
        assert loss.item() == 2.5
        loss.backward()  # type: ignore[no-untyped-call]
        assert values.grad is not None
        assert values.grad.tolist() == [[[-1.0, -2.0], [0.0, 0.0]]]
    with pytest.raises(ValueError, match="mask is empty"):
        value_loss(values, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
