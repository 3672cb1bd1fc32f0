"""Dynamic programming against explicit sums over all responses, autograd and finite differences, at 1e-12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom.lab.exact import best, law, objective, solve
from tokenloom.lab.tree import Tree

TREES = [Tree(3, 4), Tree(2, 1), Tree(4, 3, end=True), Tree(2, 4, end=True)]


def made(tree: Tree, *, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Random logits and rewards [2, S, V]; `dense` rewards also fall before the last token."""
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(2, tree.states, tree.vocab, generator=g, dtype=torch.float64)
    rewards = torch.randn(2, tree.states, tree.vocab, generator=g, dtype=torch.float64)
    return logits, rewards if dense else rewards * tree.terminal


def spelled_out(tree: Tree, logits: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and reward [R] of every response to one prompt: logits and rewards are [S, V]."""
    tokens, lengths = tree.enumerated
    valid = torch.arange(tree.horizon) < lengths[:, None]
    states = tree.states_of(tokens)
    logprobs = (logits.log_softmax(-1)[states, tokens] * valid).sum(-1)
    return logprobs.exp(), (rewards[states, tokens] * valid).sum(-1)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_values_and_occupancy_are_sums_over_responses(tree: Tree, dense: bool) -> None:
    logits, rewards = made(tree, dense=dense)
    exact = solve(tree, logits, rewards)
    tokens, lengths = tree.enumerated
    for prompt in range(2):
        probability, reward = spelled_out(tree, logits[prompt], rewards[prompt])
        assert probability.sum().item() == pytest.approx(1, abs=1e-12)
        for state in range(tree.states):
            depth = int(tree.depth[state])
            through = (tokens[:, :depth] == tree.prefixes[state, :depth]).all(-1) & (lengths > depth)
            occupancy = probability[through].sum()
            assert float(exact.occupancy[prompt, state]) == pytest.approx(float(occupancy), abs=1e-12)
            earlier = sum(
                float(rewards[prompt, tree.states_of(tree.prefixes[state : state + 1].clamp(min=0))[0, t],
                              tree.prefixes[state, t]])
                for t in range(depth)
            )  # fmt: skip
            value = (probability * reward)[through].sum() / occupancy - earlier
            assert float(exact.values[prompt, state]) == pytest.approx(float(value), abs=1e-10)
            for token in range(tree.vocab):
                taken = through & (tokens[:, depth] == token)
                q = (probability * reward)[taken].sum() / probability[taken].sum() - earlier
                assert float(exact.q[prompt, state, token]) == pytest.approx(float(q), abs=1e-10)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_gradient_is_autograds_and_that_of_finite_differences(tree: Tree) -> None:
    logits, rewards = made(tree)
    leaf = logits.clone().requires_grad_()
    exact = solve(tree, leaf, rewards)
    (by_autograd,) = torch.autograd.grad(exact.objective, leaf)
    torch.testing.assert_close(exact.gradient.detach(), by_autograd, rtol=1e-10, atol=1e-14)
    step = 1e-5
    for at in range(0, logits.numel(), max(1, logits.numel() // 20)):
        up, down = logits.clone(), logits.clone()
        up.view(-1)[at] += step
        down.view(-1)[at] -= step
        slope = (objective(tree, law(up), rewards) - objective(tree, law(down), rewards)) / (2 * step)
        # Central differences: |J'''| h^2 / 6 with |J'''| of order 1, and rounding 1e-16 / h.
        assert float(exact.gradient.detach().view(-1)[at]) == pytest.approx(float(slope), abs=1e-9)


def test_occupancy_sums_to_the_expected_length_and_levels_to_one() -> None:
    fixed, ending = Tree(3, 4), Tree(4, 3, end=True)
    exact = solve(fixed, *made(fixed))
    for depth in range(fixed.horizon):
        torch.testing.assert_close(exact.occupancy[:, fixed.level(depth)].sum(-1), torch.ones(2, dtype=torch.float64))
    assert float(exact.length) == pytest.approx(4, abs=1e-12)
    logits, rewards = made(ending)
    lengths = ending.enumerated[1].to(torch.float64)
    expected = sum(float((spelled_out(ending, logits[p], rewards[p])[0] * lengths).sum()) for p in range(2)) / 2
    assert float(solve(ending, logits, rewards).length) == pytest.approx(expected, abs=1e-12)


def test_entropy_per_token_is_that_of_whole_responses_over_their_length() -> None:
    tree = Tree(4, 3, end=True)
    logits, rewards = made(tree)
    exact = solve(tree, logits, rewards)
    whole = [spelled_out(tree, logits[p], rewards[p])[0] for p in range(2)]
    bits = sum(float(-(p * p.log()).sum()) for p in whole) / 2
    assert float(exact.entropy * exact.length) == pytest.approx(bits, abs=1e-12)
    sure = logits.clone()
    sure[..., 0] = 1e4
    assert float(solve(tree, sure, rewards).entropy) == 0


def test_best_is_each_prompts_best_response() -> None:
    tree = Tree(4, 3, end=True)
    logits, rewards = made(tree)
    expected = sum(float(spelled_out(tree, logits[p], rewards[p])[1].max()) for p in range(2)) / 2
    assert float(best(tree, rewards)) == pytest.approx(expected, abs=1e-12)


def test_advantages_average_to_zero_and_law_is_softmax() -> None:
    tree = Tree(3, 4)
    logits, rewards = made(tree)
    exact = solve(tree, logits, rewards)
    assert float((exact.probs * exact.advantages).sum(-1).abs().max()) < 1e-14
    torch.testing.assert_close(law(1000 * logits), (1000 * logits).softmax(-1), rtol=1e-12, atol=0)


def test_a_tree_of_the_largest_size_is_solved() -> None:
    tree = Tree(2, 17)
    logits = torch.zeros(1, tree.states, 2, dtype=torch.float64)
    rewards = torch.zeros_like(logits)
    rewards[0, tree.level(16), 1] = 1
    assert float(solve(tree, logits, rewards).objective) == pytest.approx(0.5, abs=1e-12)
