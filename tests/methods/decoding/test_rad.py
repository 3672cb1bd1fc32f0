"""RAD: the worked example, its limits, and the loss of its reward model."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.rad import best_tokens, cumulative_mse, reward_augmented

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)


def augmented(k: int, rewards: list[float], beta: float, *, inverse: bool = False) -> torch.Tensor:
    given = torch.tensor([rewards], dtype=torch.float64)
    return reward_augmented(SCORES, best_tokens(SCORES, k), given, beta=beta, inverse=inverse)


def test_worked_numbers() -> None:
    shaped = augmented(3, [0.1, 0.9, 0.5], 2.0)
    torch.testing.assert_close(shaped, torch.tensor([[2.2, 2.8, 1.0, -torch.inf]], dtype=torch.float64))
    expected = torch.tensor([[0.320173, 0.583393, 0.096434, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shaped.softmax(-1), expected, rtol=0, atol=5e-7)
    turned = augmented(3, [0.9, 0.1, 0.5], 2.0, inverse=True)
    torch.testing.assert_close(turned, shaped)


@pytest.mark.parametrize(("rewards", "beta"), [([0.1, 0.9, 0.5], 0.0), ([0.4, 0.4, 0.4], 30.0)])
def test_no_weight_or_equal_rewards_are_top_k(rewards: list[float], beta: float) -> None:
    top_k = SCORES.masked_fill(torch.tensor([[False, False, False, True]]), -torch.inf).softmax(-1)
    torch.testing.assert_close(augmented(3, rewards, beta).softmax(-1), top_k, rtol=0, atol=1e-12)


def test_one_token_is_greedy() -> None:
    assert augmented(1, [0.0], 30.0).softmax(-1).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_rewards_are_clamped() -> None:
    torch.testing.assert_close(augmented(2, [-3.0, 7.0], 2.0), augmented(2, [0.0, 1.0], 2.0))


def test_ties_go_to_the_lowest_ids() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-torch.inf, 0.0, -torch.inf, -torch.inf]])
    assert best_tokens(scores, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    assert best_tokens(scores, 9).tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match="k >= 1"):
        best_tokens(scores, 0)


def test_loss_weighs_later_tokens() -> None:
    rewards = torch.tensor([[0.5, 0.0, 1.0], [0.2, torch.nan, torch.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = cumulative_mse(rewards, torch.tensor([1.0, 0.0], dtype=torch.float64), mask)
    # (1 * .25 + 2 * 1 + 3 * 0) / 6 and 1 * .04 / 1
    assert loss.item() == pytest.approx((2.25 / 6 + 0.04) / 2, abs=1e-12)
    loss.backward()
    assert rewards.grad is not None
    assert rewards.grad[0].tolist() == pytest.approx([-1 / 12, -4 / 12, 0.0], abs=1e-12)
    assert rewards.grad[1].tolist() == pytest.approx([0.2, 0.0, 0.0], abs=1e-12)


def test_constant_error_does_not_depend_on_length() -> None:
    mask = torch.arange(5) < torch.tensor([[1], [3], [5]])
    loss = cumulative_mse(torch.full((3, 5), 0.5), torch.ones(3), mask)
    assert float(loss) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="at least one token"):
        cumulative_mse(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2, dtype=torch.bool))
