"""The tiny transformer: its enumerated table is its own forward, and the pulled-back gradient is that of J."""

from __future__ import annotations

import pytest
import torch

from lab.tiny import tiny_task
from tokenloom.lab.collect import Sampler
from tokenloom.lab.critic import Critic
from tokenloom.lab.exact import solve
from tokenloom.lab.families import families
from tokenloom.lab.learn import learn
from tokenloom.lab.oracle import oracle
from tokenloom.lab.step import losses, make_plan
from tokenloom.lab.task import Task, places
from tokenloom.lab.transformer import TransformerPolicy
from tokenloom.lab.tree import Tree


def made(task: Task) -> TransformerPolicy:
    critic = Critic(torch.zeros(task.logits.shape[:2], dtype=torch.float64))
    return TransformerPolicy.imitating(task, critic=critic, seed=0)


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task(Tree(3, 3, end=True), prompts=2)


@pytest.fixture(scope="module")
def policy(task: Task) -> TransformerPolicy:
    return made(task)


def test_it_begins_near_the_tasks_policy(task: Task, policy: TransformerPolicy) -> None:
    wanted = solve(task.tree, task.logits, task.rewards)
    law = policy.table().log_softmax(-1)
    apart = (wanted.probs * (wanted.probs.log() - law)).sum(-1)
    # The tasks' logits are independent normals of deviation 0.5 in every state. A model that learned their average and
    # nothing of a single state would be apart by half the variance under a law of 3 tokens: 0.5 * 0.25 * 2 / 3.
    assert float((wanted.occupancy * apart).sum() / wanted.occupancy.sum()) < 0.5 * 0.25 * 2 / 3
    torch.testing.assert_close(made(task).table(), policy.table(), rtol=0, atol=0)


@pytest.mark.parametrize("tree", [Tree(3, 3, end=True), Tree(3, 3)], ids=str)
def test_the_table_is_what_the_engine_says_of_sampled_tokens(tree: Tree) -> None:
    task = tiny_task(tree, prompts=2)
    policy = made(task)
    rollouts = Sampler(task, policy.table(), torch.Generator().manual_seed(0)).draw(torch.arange(2).repeat(30))
    found = policy.signals(rollouts, ["logprobs", "entropies", "ref_logprobs", "values"], grad=True)
    laws = policy.table().log_softmax(-1).flatten(0, 1)[places(tree, rollouts)]
    expected = {
        "logprobs": laws.gather(-1, rollouts.tokens[..., None])[..., 0],
        "ref_logprobs": laws.gather(-1, rollouts.tokens[..., None])[..., 0],
        "entropies": -(laws.exp() * laws).sum(-1),
        "values": policy.critic.values.detach().flatten()[places(tree, rollouts)],
    }
    for name, value in expected.items():
        signal = found.named()[name].detach()
        assert signal.dtype == torch.float64
        torch.testing.assert_close(signal[rollouts.mask], value[rollouts.mask], rtol=0, atol=2e-6, msg=name)


def test_the_pulled_back_gradient_is_the_slope_of_j(task: Task, policy: TransformerPolicy) -> None:
    gradient = policy.pull_back(solve(task.tree, policy.table(), task.rewards).gradient)
    assert gradient.shape == (sum(p.numel() for p in policy.parameters),)
    direction = gradient / gradient.norm()
    ends = []
    for sign in (1, -1):
        other = policy.copy()
        at = 0
        with torch.no_grad():
            for parameter in other.parameters:
                step = direction[at : at + parameter.numel()].view(parameter.shape).to(parameter.dtype)
                parameter.add_(step, alpha=sign * 1e-2)
                at += parameter.numel()
        ends.append(float(solve(task.tree, other.table(), task.rewards).objective))
    # Central difference over 0.02: curvature drops out, the third derivative and float32 leave a percent or so.
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_the_mean_of_the_oracles_estimates_points_along_it(task: Task, policy: TransformerPolicy) -> None:
    exact = solve(task.tree, policy.table(), task.rewards)
    policy.critic.set(exact.values)
    generator = torch.Generator().manual_seed(0)
    batch = Sampler(task, policy.table(), generator, group_size=2000).collect(oracle(), {})
    plan = make_plan(
        oracle(), batch.rollouts, policy, {}, step=0, total_steps=1, generator=generator, moved=False
    )  # fmt: skip
    ((_, _, loss),) = losses(oracle(), plan, batch.rollouts, policy, generator)
    estimate = -torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, policy.parameters)]).double()
    truth = policy.pull_back(exact.gradient)
    assert float(estimate @ truth / (estimate.norm() * truth.norm())) > 0.99
    assert float(estimate @ truth / (truth @ truth)) == pytest.approx(1, abs=0.1)


def test_moved_copies_differ_as_much_as_asked_and_keep_the_reference(task: Task, policy: TransformerPolicy) -> None:
    moved = policy.moved(0.3, torch.Generator().manual_seed(0))
    assert float((moved.table() - policy.table()).std()) == pytest.approx(0.3, rel=0.3)
    rollouts = Sampler(task, policy.table(), torch.Generator().manual_seed(0)).draw(torch.tensor([0, 1]))
    references = [p.signals(rollouts, ["ref_logprobs"]).ref_logprobs for p in (policy, moved)]
    assert references[0] is not None
    assert references[1] is not None
    torch.testing.assert_close(references[0], references[1], rtol=0, atol=0)


def test_it_learns_and_its_reference_stays(task: Task) -> None:
    policy = made(task)
    before = policy.table()
    # Steps have a length of their own; with groups of 8 their noise may carry the last ones away from the optimum.
    learned = learn(oracle(), task, policy, samples=1280, group_size=32, seed=0, exact_critic=True)
    assert learned.objective[-1] > learned.objective[0] + 0.1
    assert not torch.equal(policy.table(), before)
    rollouts = Sampler(task, before, torch.Generator().manual_seed(0)).draw(torch.tensor([0, 1]))
    reference = policy.signals(rollouts, ["ref_logprobs"]).ref_logprobs
    laws = before.log_softmax(-1).flatten(0, 1)[places(task.tree, rollouts), rollouts.tokens]
    assert reference is not None
    torch.testing.assert_close(reference[rollouts.mask], laws[rollouts.mask], rtol=0, atol=2e-6)


def test_a_tree_too_large_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8192 responses are too many for a transformer \(at most 4096\)"):
        made(tiny_task(Tree(2, 13)))


def test_every_family_fits() -> None:
    assert all(f.make(0).tree.responses <= 4096 for f in families().values())
