"""Drawn responses have the policy's law; a step's batch is the trainer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lab.tiny import tiny_task, unregistered
from tokenloom.algorithm import Algorithm
from tokenloom.lab.collect import ROUNDS, Sampler
from tokenloom.lab.exact import solve
from tokenloom.lab.families import families
from tokenloom.lab.task import Task, places
from tokenloom.lab.tree import Tree
from tokenloom.masked import masked_sum, valid_positions


def sampler(task: Task, table: Tensor | None = None, *, seed: int = 0, group_size: int = 8) -> Sampler:
    generator = torch.Generator().manual_seed(seed)
    return Sampler(task, task.logits if table is None else table, generator, group_size=group_size)


@pytest.mark.parametrize("tree", [Tree(3, 3), Tree(3, 3, end=True)], ids=str)
def test_responses_are_drawn_with_their_exact_probabilities(tree: Tree) -> None:
    task, rows = tiny_task(tree), 20_000
    drawn = sampler(task).draw(torch.zeros(rows, dtype=torch.int64))
    tokens, lengths = tree.enumerated
    valid = valid_positions(lengths, tree.horizon)
    laws = task.logits[0].log_softmax(-1)[tree.states_of(tokens), tokens]
    expected = masked_sum(laws, valid, -1).exp() * rows
    same = (drawn.tokens[:, None] == tokens[None]).all(-1) & (drawn.lengths[:, None] == lengths)
    observed = same.sum(0)
    assert int(observed.sum()) == rows
    # Chi-square with R - 1 degrees of freedom: mean R - 1, deviation sqrt(2 (R - 1)); five of them.
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(tokens) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_draw_is_complete_and_scored() -> None:
    task = families()["short-right"].make(0)
    batch = sampler(task).collect(Algorithm.from_recipe("rloo"), {}, step=4)
    rollouts, tree = batch.rollouts, task.tree
    assert (batch.rows, batch.tokens) == (32, int(rollouts.lengths.sum()))
    assert rollouts.group_ids.tolist() == [p for p in range(4) for _ in range(8)]
    end = tree.vocab - 1
    for i in range(len(rollouts)):
        row = rollouts.response(i).tolist()
        assert end not in row[:-1]
        assert rollouts.truncated is not None
        assert bool(rollouts.truncated[i]) == (row[-1] != end)
        assert len(row) == tree.horizon or row[-1] == end
        prompt = int(rollouts.group_ids[i])
        assert rollouts.prompts is not None
        assert rollouts.prompts[i] == {"prompt": prompt, "answer": task.truth[prompt]}
        right = row[0] == int(task.truth[prompt]) and len(row) <= 3
        assert rollouts.rewards is not None
        assert float(rollouts.rewards[i]) == right
        assert rollouts.answers is not None
        assert rollouts.answers[i] == str(row[0])
    assert rollouts.policy_version is not None
    assert rollouts.policy_version.unique().tolist() == [4]
    laws = task.logits.flatten(0, 1).log_softmax(-1)[places(tree, rollouts), rollouts.tokens]
    assert rollouts.sampler_logprobs is not None
    torch.testing.assert_close(rollouts.sampler_logprobs[rollouts.mask], laws[rollouts.mask])


def test_the_same_seed_draws_the_same_responses_whatever_the_algorithm() -> None:
    task = families()["critical-token"].make(0)
    drawn = [sampler(task).collect(Algorithm.from_recipe(a), {}).rollouts.tokens for a in ("rloo", "grpo")]
    assert torch.equal(drawn[0], drawn[1])


def test_dropped_groups_are_replaced_and_paid_for() -> None:
    task = families()["solved-and-hopeless"].make(0)
    batch = sampler(task).collect(Algorithm.from_recipe("dapo"), {})
    rollouts = batch.rollouts
    assert rollouts.rewards is not None
    for group in rollouts.group_ids.unique():
        assert len(rollouts.rewards[rollouts.group_ids == group].unique()) == 2
    assert batch.rows in range(32, 32 * ROUNDS + 1, 32)
    assert batch.rows > 32
    assert len(rollouts.group_ids.unique()) <= 4


def test_where_nothing_is_worth_keeping_the_last_round_stands_for_the_step() -> None:
    task = families()["critical-token"].make(0)
    hopeless = Task(task.tree, torch.zeros_like(task.rewards), task.logits, task.decisive, task.truth)
    batch = sampler(hopeless).collect(Algorithm.from_recipe("dapo"), {})
    assert (batch.rows, len(batch.rollouts)) == (32 * ROUNDS, 32)


def test_a_sampling_stage_shapes_the_law_and_not_the_reported_logprobs() -> None:
    def greedy(logits: Tensor) -> Tensor:
        return logits * 1e6

    task = families()["critical-token"].make(0)
    algorithm = Algorithm.compose(advantage="rloo", sampling=[unregistered("sampling", greedy)])
    rollouts = sampler(task).collect(algorithm, {}).rollouts
    at = places(task.tree, rollouts)
    assert torch.equal(rollouts.tokens, task.logits.flatten(0, 1)[at].argmax(-1))
    assert rollouts.sampler_logprobs is not None
    laws = task.logits.flatten(0, 1).log_softmax(-1)[at, rollouts.tokens]
    torch.testing.assert_close(rollouts.sampler_logprobs, laws)


def test_extras_are_collected_when_a_part_asks() -> None:
    def reads(rewards: Tensor, mask: Tensor, reference_rewards: Tensor, answer_mask: Tensor) -> Tensor:
        return (rewards - reference_rewards)[:, None] * mask * answer_mask

    task = families()["repairable"].make(0)
    algorithm = Algorithm.compose(advantage=unregistered("advantage", reads))
    sure = task.logits.clone()
    for prompt, truth in enumerate(task.truth):
        sure[prompt, 0, int(truth.split()[0])] = 1e3
    batch = sampler(task, sure, group_size=64).collect(algorithm, {})
    extras, rollouts = batch.rollouts.extras, batch.rollouts
    assert rollouts.rewards is not None
    assert float(rollouts.rewards.mean()) == 1
    assert torch.equal(extras["answer_mask"].any(0), torch.tensor([True, False, True, False, False, False]))
    initial = float(solve(task.tree, task.logits, task.rewards).objective)
    # 256 draws of the initial policy: five standard errors.
    assert abs(float(extras["reference_rewards"].mean()) - initial) < 5 * (initial * (1 - initial) / 256) ** 0.5
    assert batch.rows == 512


@pytest.mark.parametrize("name", ["irreparable", "long-right"])
def test_branches_estimate_the_value_of_the_state_they_leave(name: str) -> None:
    task = families()[name].make(0)
    algorithm = Algorithm.from_recipe({"preset": "segment-po", "samples": 2000, "every": 2})
    batch = sampler(task, group_size=2).collect(algorithm, {})
    rollouts = batch.rollouts
    found, asked = rollouts.extras["segment_values"], algorithm.branches(rollouts)
    assert asked is not None
    assert torch.equal(found.isnan(), asked == 0)
    at = places(task.tree, rollouts)[asked > 0]
    values = solve(task.tree, task.logits, task.rewards).values.flatten()[at]
    # Five standard errors of the mean of 2,000 coin flips.
    assert float((found[asked > 0] - values).abs().max()) < 5 * 0.5 / 2000**0.5
    different = len(at.unique())
    assert different < len(at)
    assert batch.rows == 8 + 2000 * different
    assert 2000 * different <= batch.tokens - int(rollouts.lengths.sum()) <= 2000 * different * task.tree.horizon


def test_nothing_else_is_collected_unasked() -> None:
    task = families()["repairable"].make(0)
    assert not sampler(task).collect(Algorithm.from_recipe("rloo"), {}).rollouts.extras
