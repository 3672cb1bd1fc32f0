"""REINFORCE++: returns by token, whitened over the batch; tool spans; OpenRLHF's variance."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.masked import at_last_position
from tokenloom.methods.policy_optimization.reinforce_pp import discounted_returns, reinforce_pp, reinforce_pp_baseline

TOOL = torch.tensor([[True, True, False, False, True]])


def test_defaults() -> None:
    assert defaults("reinforce-pp") == {"gamma": 1.0, "masked": "carry", "correction": 1}
    assert defaults("reinforce-pp/baseline") == {"correction": 1}
    assert preset_defaults("reinforce-pp") == {"baseline": False, "dialect": "verl", "kl_coef": 0.0}


def test_returns_are_discounted_sums() -> None:
    close(discounted_returns(row(0, 0, 1), ones(1, 3)), [[1.0, 1.0, 1.0]])
    close(discounted_returns(row(-0.5, 2, 1), ones(1, 3), gamma=0.5), [[0.75, 2.5, 1.0]])


def test_tool_output_carries_the_return_or_resets_it() -> None:
    rewards = row(0, 0, 100, -100, 1)  # what stands on tool output is ignored
    close(discounted_returns(rewards, TOOL), [[1.0, 1.0, 0.0, 0.0, 1.0]])
    close(discounted_returns(rewards, TOOL, gamma=0.5), [[0.25, 0.5, 0.0, 0.0, 1.0]])
    close(discounted_returns(rewards, TOOL, masked="reset"), [[0.0, 0.0, 0.0, 0.0, 1.0]])
    # Credit that was earned before the tool call survives a reset.
    close(discounted_returns(row(0, 3, 0, 0, 1), TOOL, masked="reset"), [[3.0, 3.0, 0.0, 0.0, 1.0]])


def test_reset_is_a_parameter_of_the_part() -> None:
    mask = TOOL.expand(2, 5)
    rewards = at_last_position(vector(1.0, 0.0), mask)
    carried, reset = (reinforce_pp(rewards, mask, masked=m) for m in ("carry", "reset"))  # type: ignore[arg-type]
    # Carry: three tokens of return 1 and three of 0, Bessel variance 0.3.
    close(carried[0, TOOL[0]], [0.5 / 0.3**0.5] * 3, 1e-6)
    # Reset: one token of return 1 and five of 0.
    close(reset[0, TOOL[0]], [-0.4082483, -0.4082483, 2.0412415], 1e-6)


def test_whitened_over_all_sampled_tokens() -> None:
    rollouts, _ = synthetic_batch()
    assert rollouts.rewards is not None
    rewards = at_last_position(rollouts.rewards, rollouts.mask)
    found = reinforce_pp(rewards, rollouts.mask)
    used = found[rollouts.mask & ~rollouts.rewards.isnan()[:, None]]
    close(used.mean(), 0.0)
    close(used.var(), 1.0, 1e-6)
    again = reinforce_pp(
        5 * rewards - 3 * at_last_position(torch.ones(12, dtype=torch.float64), rollouts.mask), rollouts.mask
    )
    close(found, again, 1e-6)


def test_unscorable_rows_are_left_out() -> None:
    with_nan = reinforce_pp(torch.tensor([[1.0], [0.0], [NAN]]), ones(3))
    close(with_nan[:2], reinforce_pp(torch.tensor([[1.0], [0.0]]), ones(2)))
    assert with_nan[2].item() == 0


@pytest.mark.parametrize("mask", [[[1, 0]], [[0, 0]]])
def test_fewer_than_two_tokens_give_zeros(mask: list[list[int]]) -> None:
    m = torch.tensor(mask, dtype=torch.bool)
    close(reinforce_pp(row(1.0, 0.0), m), 0.0)
    close(reinforce_pp_baseline(vector(1.0), torch.tensor([0]), m), 0.0)


def test_group_ids_matter_to_the_baseline_variant_only() -> None:
    rewards = [1.0, 0.0, 3.0, 2.0]
    one, two = rollouts_of(rewards), rollouts_of(rewards, [0, 0, 1, 1])
    close(advantages_of(make("reinforce-pp"), one), advantages_of(make("reinforce-pp"), two))
    # Centered per group: 0.5, -0.5 twice; Bessel variance 1/3.
    found = advantages_of(make("reinforce-pp", baseline=True), two)
    close(found.squeeze(-1), [0.8660254, -0.8660254, 0.8660254, -0.8660254], 1e-6)
    assert not torch.allclose(found, advantages_of(make("reinforce-pp", baseline=True), one))


@pytest.mark.parametrize(("dialect", "right", "wrong"), [("verl", 1.5, -0.5), ("openrlhf", 1.7320508, -0.5773503)])
def test_variance_of_the_dialects(dialect: str, right: float, wrong: float) -> None:
    # Centered 0.75, -0.25 (three times): squares sum to 0.75, over 3 (Bessel) or 4 (population).
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0])
    for baseline in (True, False):
        found = advantages_of(make("reinforce-pp", dialect=dialect, baseline=baseline), rollouts)
        close(found.squeeze(-1), [right, wrong, wrong, wrong], 1e-6)


def test_long_responses_weigh_more_in_the_statistics() -> None:
    # Three tokens at 0.75 and three at -0.25: mean 0.25, population variance 0.25.
    rollouts = rollouts_of([1.0, 0.0, 0.0, 0.0], mask=[[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    found = advantages_of(make("reinforce-pp", dialect="openrlhf", baseline=True), rollouts)
    close(found, [[1, 1, 1], [-1, 0, 0], [-1, 0, 0], [-1, 0, 0]], 1e-6)


def test_constant_groups_give_exactly_zero_with_the_baseline() -> None:
    found = reinforce_pp_baseline(torch.full((5,), 0.1), torch.tensor([0, 0, 0, 1, 1]), ones(5, 3))
    assert bool((found == 0).all())


def test_kl_enters_the_token_rewards() -> None:
    rollouts = rollouts_of([0.0, 0.0], mask=[[1, 1], [1, 1]])
    ref = torch.tensor([[-2.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    # Returns -0.1, 0, 0, 0: the penalty of the first token is not seen by the second.
    found = advantages_of(make("reinforce-pp", kl_coef=0.1), rollouts, signals_of(rollouts, ref_logprobs=ref))
    close(found, [[-1.5, 0.5], [0.5, 0.5]], 1e-4)
