"""A table policy's signals against the formulas, and its optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lab.tiny import table_of, tiny_task
from tokenloom.batch import Rollouts
from tokenloom.lab.collect import Sampler
from tokenloom.lab.critic import Critic
from tokenloom.lab.table import TablePolicy, unknown_to_tables
from tokenloom.lab.task import Task, places
from tokenloom.lab.tree import Tree
from tokenloom.signals import CHUNK_SIGNALS, chunk_signal


@pytest.fixture
def setup() -> tuple[Task, TablePolicy, Rollouts]:
    task = tiny_task(Tree(4, 3, end=True), prompts=2)
    policy = table_of(task).moved(0.5, torch.Generator().manual_seed(0))
    rollouts = Sampler(task, policy.table(), torch.Generator().manual_seed(1)).draw(torch.tensor([1, 0, 1, 1]))
    return task, policy, rollouts


@pytest.fixture
def chunks() -> Iterator[None]:
    before = dict(CHUNK_SIGNALS)

    @chunk_signal("lab_probe", "logits", "ref_logits", "targets")
    def probe(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([logits.gather(-1, targets[:, None])[:, 0], ref_logits.sum(-1)], -1)

    @chunk_signal("lab_follow", "logits", "lab_probe")
    def follow(logits: Tensor, lab_probe: Tensor) -> Tensor:
        return logits.sum(-1) + lab_probe[:, 0]

    @chunk_signal("lab_hidden", "hidden")
    def hidden(hidden: Tensor) -> Tensor:
        return hidden.sum(-1)

    yield
    CHUNK_SIGNALS.clear()
    CHUNK_SIGNALS.update(before)


def test_logprobs_entropies_values_and_reference(setup: tuple[Task, TablePolicy, Rollouts]) -> None:
    task, policy, rollouts = setup
    policy.critic.set(torch.arange(2 * task.tree.states, dtype=torch.float64).view(2, -1))
    needs = ["logprobs", "old_logprobs", "ref_logprobs", "entropies", "values", "old_values"]
    found = policy.signals(rollouts, needs, grad=True)
    for i in range(len(rollouts)):
        prompt = int(rollouts.group_ids[i])
        for t in range(int(rollouts.lengths[i])):
            token = int(rollouts.tokens[i, t])
            state = int(task.tree.states_of(rollouts.tokens)[i, t])
            law = policy.table()[prompt, state].softmax(-1)
            reference = task.logits[prompt, state].log_softmax(-1)
            expected = {
                "logprobs": law[token].log(), "old_logprobs": law[token].log(), "ref_logprobs": reference[token],
                "entropies": -(law * law.log()).sum(), "values": torch.tensor(float(prompt * task.tree.states + state)),
            }  # fmt: skip
            for name, value in expected.items():
                assert float(found.named()[name][i, t].detach()) == pytest.approx(float(value), abs=1e-12), name
    carry = {n: v.requires_grad for n, v in found.named().items()}
    assert carry == {"logprobs": True, "entropies": True, "values": True, "old_logprobs": False,
                     "ref_logprobs": False, "old_values": False}  # fmt: skip
    assert not any(v.requires_grad for v in policy.signals(rollouts, needs).named().values())


def test_the_gradient_of_a_logprob_is_one_hot_minus_the_law(setup: tuple[Task, TablePolicy, Rollouts]) -> None:
    _task, policy, rollouts = setup
    logprobs = policy.signals(rollouts, ["logprobs"], grad=True).logprobs
    assert logprobs is not None
    (gradient,) = torch.autograd.grad(logprobs[1, 0], policy.logits)
    expected = torch.zeros_like(gradient)
    expected[0, 0] = -policy.table()[0, 0].softmax(-1)
    expected[0, 0, rollouts.tokens[1, 0]] += 1
    torch.testing.assert_close(gradient, expected)


def test_chunk_signals_run_on_sampled_tokens(chunks: None, setup: tuple[Task, TablePolicy, Rollouts]) -> None:
    task, policy, rollouts = setup
    found = policy.signals(rollouts, ["lab_probe", "lab_follow"], grad=True).extras
    at = places(task.tree, rollouts)
    logits, reference = policy.table().flatten(0, 1)[at], task.logits.flatten(0, 1)[at]
    taken = logits.gather(-1, rollouts.tokens[..., None])[..., 0]
    mask = rollouts.mask
    assert found["lab_probe"].shape == (*mask.shape, 2)
    torch.testing.assert_close(found["lab_probe"][mask].detach(), torch.stack([taken, reference.sum(-1)], -1)[mask])
    assert not found["lab_probe"][~mask].any()
    torch.testing.assert_close(found["lab_follow"][mask].detach(), (logits.sum(-1) + taken)[mask])
    # What is taken before the update is given, and has no gradient of its own.
    before = torch.ones_like(found["lab_probe"]).detach()
    given = policy.signals(rollouts, ["lab_follow"], grad=True, given={"lab_probe": before}).extras["lab_follow"]
    torch.testing.assert_close(given[mask].detach(), (logits.sum(-1) + 1)[mask])
    (gradient,) = torch.autograd.grad(found["lab_follow"].sum(), policy.logits)
    assert float(gradient.sum()) == int(mask.sum()) * task.tree.vocab


def test_what_a_table_lacks_is_said(chunks: None, setup: tuple[Task, TablePolicy, Rollouts]) -> None:
    assert unknown_to_tables(["logprobs", "lab_follow", "lab_hidden", "nonsense"]) == ["lab_hidden", "nonsense"]
    with pytest.raises(ValueError, match="has no lab_hidden: they need hidden states or attention"):
        setup[1].signals(setup[2], ["lab_hidden"])


def test_copies_share_critic_and_reference_and_nothing_else(setup: tuple[Task, TablePolicy, Rollouts]) -> None:
    _, policy, _ = setup
    other = policy.copy()
    with torch.no_grad():
        other.logits.add_(1.0)
    assert not torch.equal(other.table(), policy.table())
    assert other.critic is policy.critic
    assert other.reference is policy.reference


def test_a_critic_moves_against_its_gradient() -> None:
    critic = Critic(torch.zeros(1, 3, dtype=torch.float64))
    critic.step(torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64))
    assert critic.values.detach().sign().tolist() == [[-1.0, 1.0, 0.0]]
