"""Each family is what its claim says, on the exact advantages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.lab.exact import Exact, best, solve
from tokenloom.lab.families import families
from tokenloom.lab.task import Draft, Task
from tokenloom.lab.tree import Tree


def solved(name: str, seed: int = 3) -> tuple[Task, Exact]:
    task = families()[name].make(seed)
    return task, solve(task.tree, task.logits, task.rewards)


def spread(task: Task, exact: Exact) -> Tensor:
    """[H]: root mean square of the exact advantage at each position, under the policy."""
    square = exact.occupancy[..., None] * exact.probs * exact.advantages**2
    return torch.stack([square[:, task.tree.level(t)].sum() for t in range(task.tree.horizon)]).sqrt()


@pytest.mark.parametrize("name", families())
def test_rewards_are_zero_or_one_and_every_prompt_can_be_solved_but_is_not(name: str) -> None:
    task, exact = solved(name)
    assert set(task.rewards[:, task.tree.terminal].unique().tolist()) == {0.0, 1.0}
    assert not task.rewards[:, ~task.tree.terminal].any()
    assert float(best(task.tree, task.rewards)) == 1
    assert bool(((exact.values[:, 0] > 0.01) & (exact.values[:, 0] < 0.99)).all())
    assert task.tree.responses <= 4096


@pytest.mark.parametrize("name", families())
def test_a_seed_is_a_task(name: str) -> None:
    first, again, other = (families()[name].make(seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.logits, again.logits, rtol=0, atol=0)
    torch.testing.assert_close(first.rewards, again.rewards, rtol=0, atol=0)
    assert not torch.equal(first.logits, other.logits)


@pytest.mark.parametrize(
    ("name", "positions"),
    [("critical-token", {2}), ("conjunction", {0, 1, 2}), ("irreparable", {0, 2}), ("confident-mistake", {2}),
     ("spurious", {1}), ("off-policy", {0, 2}), ("stale-sampler", {0, 2}), ("solved-and-hopeless", {2})],
)  # fmt: skip
def test_only_the_deciding_positions_have_an_advantage(name: str, positions: set[int]) -> None:
    task, exact = solved(name)
    sizes = spread(task, exact)
    assert {t for t in range(task.tree.horizon) if sizes[t] > 1e-9} == positions
    assert set(task.decisive) == positions


def test_after_a_wrong_start_nothing_helps_or_something_does() -> None:
    task, exact = solved("irreparable")
    for prompt, truth in enumerate(task.truth):
        wrong = (task.tree.depth > 0) & (task.tree.prefixes[:, 0] != int(truth.split()[0]))
        assert float(exact.advantages[prompt, wrong].abs().max()) == 0
    task, exact = solved("repairable")
    for prompt, truth in enumerate(task.truth):
        right = (task.tree.depth > 0) & (task.tree.prefixes[:, 0] == int(truth.split()[0]))
        mending = (task.tree.depth == 2) & ~right
        assert float(exact.advantages[prompt, right].abs().max()) < 1e-12
        assert float(exact.advantages[prompt, mending].abs().max()) > 0.5


def test_the_spurious_token_follows_success_and_earns_nothing() -> None:
    task, exact = solved("spurious")
    for prompt, truth in enumerate(task.truth):
        at = task.tree.depth == 3
        right = at & (task.tree.prefixes[:, 1] == int(truth))
        after_success = exact.probs[prompt, right].amax(-1)
        assert float(after_success.min()) == pytest.approx(0.85)
        frequent = int(exact.probs[prompt, right][0].argmax())
        assert float(exact.probs[prompt, at & ~right, frequent].max()) == pytest.approx(0.25)
        assert float(exact.advantages[prompt, at].abs().max()) < 1e-12


def test_in_a_conflict_no_token_is_right_or_wrong_by_itself() -> None:
    task, _ = solved("conflict")
    tokens, _ = task.tree.enumerated
    for prompt in range(task.prompts):
        rewards = task.rewards[prompt, task.tree.terminal]
        for position in range(task.tree.horizon):
            shares = [float(rewards[tokens[:, position] == token].mean()) for token in range(task.tree.vocab)]
            assert shares == [0.25] * task.tree.vocab


def test_lengths_decide_where_they_should() -> None:
    for name, fits in (("short-right", lambda n: n <= 3), ("long-right", lambda n: n >= 5)):
        task, _ = solved(name)
        tokens, lengths = task.tree.enumerated
        for prompt, truth in enumerate(task.truth):
            expected = (tokens[:, 0] == int(truth)) & fits(lengths)
            assert torch.equal(task.rewards[prompt, task.tree.terminal] > 0, expected)


def test_success_rates_and_certainties_are_as_stated() -> None:
    _, exact = solved("solved-and-hopeless")
    assert exact.values[:, 0].tolist() == pytest.approx([0.95, 0.85, 0.1, 0.04])
    task, exact = solved("boilerplate")
    form = [exact.probs[p, task.tree.level(0)].amax() for p in range(task.prompts)]
    assert [float(f) for f in form] == pytest.approx([0.99] * task.prompts)
    task, exact = solved("confident-mistake")
    torch.testing.assert_close(exact.probs[:, task.tree.level(2)].amax(-1), torch.full((4, 16), 0.84).double())


def test_favoring_a_token_leaves_the_others_in_proportion() -> None:
    draft = Draft(Tree(3, 2), seed=0, prompts=1)
    before = draft.logits.softmax(-1)
    draft.favor(0, draft.at(1, t0=2), {1: 0.7})
    after = draft.logits.softmax(-1)
    changed = (draft.tree.depth == 1) & (draft.tree.prefixes[:, 0] == 2)
    torch.testing.assert_close(after[0, ~changed], before[0, ~changed])
    assert float(after[0, changed, 1]) == pytest.approx(0.7)
    ratio = before[0, changed, 0] / before[0, changed, 2]
    torch.testing.assert_close(after[0, changed, 0] / after[0, changed, 2], ratio)
