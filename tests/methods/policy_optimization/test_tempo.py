"""TEMPO: the prefix tree against brute force and exact enumeration, then the advantages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    synthetic_batch,
    vector,
)
from tokenloom.batch import Rollouts
from tokenloom.methods.policy_optimization.grpo import grpo
from tokenloom.methods.policy_optimization.prefix_tree import next_decision, prefix_nodes, prefix_values
from tokenloom.methods.policy_optimization.tempo import tempo, tree_td

TOKENS = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9]])
REWARDS = vector(1, 0, 0, 1)
UNDIVIDED = [[1 / 3, 2 / 3, 1], [-2 / 3, -1 / 3, -1], [-2 / 3, -5 / 6, -1 / 2], [1, 1 / 2, 1 / 2]]
ONE_GROUP = torch.zeros(4, dtype=torch.int64)
FULL = torch.full((4,), 3)


def batch_of(tokens: Tensor, rewards: Tensor, lengths: Tensor, group_ids: Tensor) -> Rollouts:
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    base = rollouts_of(rewards.tolist(), group_ids.tolist(), mask=mask.int().tolist())
    return base.replace(tokens=tokens)


def test_defaults() -> None:
    assert defaults("tempo") == {"std": "group", "eps": 1e-6}
    assert preset_defaults("tempo") == {"std": "group", "low": 0.2, "high": 0.28}
    algorithm = make("tempo")
    assert algorithm.terms == ()  # the released scripts switch the KL off
    assert algorithm.aggregate.part.name == "token-mean"


# -- the prefix tree


def random_group(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens from a small alphabet, so that prefixes are shared, ragged lengths, scattered groups, duplicates."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (24, 5), generator=g)
    lengths = torch.randint(0, 6, (24,), generator=g)
    group_ids = torch.randint(0, 3, (24,), generator=g) * 7
    rewards = torch.rand(24, generator=g).double()
    rewards[3] = NAN
    return tokens, lengths, group_ids, rewards


def state(tokens: Tensor, lengths: Tensor, group_ids: Tensor, row: int, t: int) -> tuple[object, ...]:
    """The group, the first t tokens, and whether the response ended there: what two rows must have in common."""
    length = int(lengths[row])
    return int(group_ids[row]), tuple(tokens[row, : min(t, length)].tolist()), 0 < length <= t or t > length


@pytest.mark.parametrize("seed", range(6))
def test_nodes_are_the_states_of_brute_force(seed: int) -> None:
    tokens, lengths, group_ids, _ = random_group(seed)
    nodes = prefix_nodes(tokens, lengths, group_ids)
    for t in range(6):
        states = [state(tokens, lengths, group_ids, i, t) for i in range(24)]
        for i, k in itertools.product(range(24), repeat=2):
            assert (int(nodes[i, t]) == int(nodes[k, t])) == (states[i] == states[k]), (i, k, t)


@pytest.mark.parametrize("seed", range(6))
def test_values_are_the_means_of_brute_force(seed: int) -> None:
    tokens, lengths, group_ids, rewards = random_group(seed)
    values = prefix_values(prefix_nodes(tokens, lengths, group_ids), rewards, ~rewards.isnan())
    for i, t in itertools.product(range(24), range(6)):
        here = state(tokens, lengths, group_ids, i, t)
        through = [
            float(rewards[k])
            for k in range(24)
            if state(tokens, lengths, group_ids, k, t) == here and not math.isnan(rewards[k])
        ]
        assert float(values[i, t]) == pytest.approx(sum(through) / len(through) if through else 0.0, abs=1e-12)


WIDTH, CHOICES, SHARES = 3, 3, 4


def enumerated(seed: int) -> tuple[Tensor, Tensor, Tensor, dict[tuple[int, ...], float], dict[tuple[int, ...], Tensor]]:
    """A policy with probabilities in quarters over three tokens, token 2 ending the response; every response once,
    its probability times 4^3, its reward, and the exact values by backward recursion."""
    g = torch.Generator().manual_seed(seed)
    policy: dict[tuple[int, ...], Tensor] = {}
    outcome: dict[tuple[int, ...], float] = {}
    value: dict[tuple[int, ...], float] = {}

    def solve(prefix: tuple[int, ...]) -> float:
        if len(prefix) == WIDTH or prefix[-1:] == (2,):
            outcome[prefix] = float(torch.rand(1, generator=g, dtype=torch.float64))
            value[prefix] = outcome[prefix]
            return value[prefix]
        policy[prefix] = torch.tensor([[1, 1, 2], [2, 1, 1], [1, 2, 1]])[int(torch.randint(3, (1,), generator=g))]
        below = [solve((*prefix, a)) for a in range(CHOICES)]
        value[prefix] = sum(float(n) / SHARES * v for n, v in zip(policy[prefix], below, strict=True))
        return value[prefix]

    solve(())
    responses = sorted(outcome)
    counts = [
        math.prod(int(policy[r[:t]][r[t]]) for t in range(len(r))) * SHARES ** (WIDTH - len(r)) for r in responses
    ]
    padded = torch.tensor([[*r, *[0] * (WIDTH - len(r))] for r in responses])
    return (
        padded,
        torch.tensor([len(r) for r in responses]),
        torch.tensor(counts),
        value,
        {r: vector(outcome[r]) for r in responses},
    )


@pytest.mark.parametrize("seed", range(4))
def test_on_every_response_the_tree_is_the_exact_value_function(seed: int) -> None:
    # Each response as often as it is likely: 64 rows. V(s') - V(s) is then the exact advantage Q(s, a) - V(s).
    tokens, lengths, counts, exact, outcome = enumerated(seed)
    assert int(counts.sum()) == SHARES**WIDTH
    rewards = torch.cat([outcome[tuple(t[:n].tolist())] for t, n in zip(tokens, lengths, strict=True)])
    group = torch.zeros(len(tokens), dtype=torch.int64)
    wanted = torch.zeros(len(tokens), WIDTH, dtype=torch.float64)
    for i, (row, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        for t in range(n):
            wanted[i, t] = exact[tuple(row[: t + 1])] - exact[tuple(row[:t])]
    again = torch.arange(len(tokens)).repeat_interleave(counts)
    mask = (torch.arange(WIDTH)[None] < lengths[:, None])[again]
    found = tree_td(rewards[again], tokens[again], lengths[again], group[again], mask)
    close(found, wanted[again])
    # One row a response, weighted by its probability, is the same tree.
    nodes = prefix_nodes(tokens, lengths, group)
    values = prefix_values(nodes, rewards, group == 0, counts.double() / counts.sum())
    for i, (row, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        for t in range(n + 1):
            assert float(values[i, t]) == pytest.approx(exact[tuple(row[:t])], abs=1e-12)


def test_next_decision_passes_over_tool_output() -> None:
    mask = torch.tensor([[True, False, False, True, True, False], [False] * 6])
    assert next_decision(mask).tolist() == [[3, 3, 3, 4, 6, 6], [6] * 6]
    assert next_decision(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


# -- advantages


def test_worked_numbers() -> None:
    base = grpo(REWARDS, ONE_GROUP, ones(4, 3), std="none")
    close(tempo(base, REWARDS, TOKENS, FULL, ONE_GROUP, ones(4, 3), std="none"), UNDIVIDED)
    rollouts = batch_of(TOKENS, REWARDS, FULL, ONE_GROUP)
    close(advantages_of(make("tempo", std="none"), rollouts), UNDIVIDED)
    divided = torch.tensor(UNDIVIDED, dtype=torch.float64) / (1 / math.sqrt(3) + 1e-6)
    close(advantages_of(make("tempo"), rollouts), divided)
    assert float(divided[0, 0]) == pytest.approx((1 / 3) / 0.57735, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_td_errors_telescope(seed: int) -> None:
    tokens, lengths, group_ids, rewards = random_group(seed)
    mask = torch.arange(5)[None] < lengths[:, None]
    td = tree_td(rewards, tokens, lengths, group_ids, mask)
    scored = ~rewards.isnan()
    for i in range(24):
        same = (group_ids == group_ids[i]) & scored
        twins = same & (lengths == lengths[i]) & ((tokens == tokens[i]) | ~mask).all(-1)
        expected = rewards[twins].mean() - rewards[same].mean() if scored[i] and lengths[i] > 0 else vector(0)[0]
        assert float(td[i].sum()) == pytest.approx(float(expected), abs=1e-12)


def test_without_shared_tokens_only_the_first_one_differs_from_grpo() -> None:
    tokens = torch.tensor([[1, 5, 5], [2, 5, 5], [3, 5, 5], [4, 5, 5]])
    rollouts = batch_of(tokens, REWARDS, FULL, ONE_GROUP)
    found, plain = advantages_of(make("tempo"), rollouts), advantages_of(make("grpo", kl_coef=0.0), rollouts)
    close(found[:, 1:], plain[:, 1:])
    close(found[:, 0], 2 * plain[:, 0])


def test_tokens_without_a_branch_are_grpo() -> None:
    tokens, lengths, group_ids, rewards = random_group(11)
    mask = torch.arange(5)[None] < lengths[:, None]
    base = grpo(rewards, group_ids, mask)
    found = tempo(base, rewards, tokens, lengths, group_ids, mask)
    nodes = prefix_nodes(tokens, lengths, group_ids)
    sizes = torch.stack([(nodes[:, t][:, None] == nodes[:, t][None]).sum(-1) for t in range(6)], -1)
    straight = mask & (sizes[:, 1:] == sizes[:, :-1])
    assert bool(straight.any())
    close(found[straight], base[straight])


def test_a_response_that_ended_does_not_match_padding_nor_a_longer_one() -> None:
    # Rows 0 and 1 agree up to row 0's end; row 1 goes on with the padding id. They part at the last common token.
    tokens, lengths = torch.tensor([[5, 6, 0], [5, 6, 0]]), torch.tensor([2, 3])
    mask = torch.arange(3)[None] < lengths[:, None]
    td = tree_td(vector(1, 0), tokens, lengths, torch.tensor([3, 3]), mask)
    close(td, [[0, 0.5, 0], [0, -0.5, 0]])


def test_identical_responses_never_separate() -> None:
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4]])
    td = tree_td(vector(1, 0, 1), tokens, torch.full((3,), 2), torch.zeros(3, dtype=torch.int64), ones(3, 2))
    close(td, [[-1 / 6, 0], [-1 / 6, 0], [1 / 3, 0]])


def test_degenerate_groups_are_grpo() -> None:
    tokens = torch.tensor([[1, 2], [1, 3], [1, 3]])
    group, full = torch.zeros(3, dtype=torch.int64), torch.full((3,), 2)
    for rewards in (torch.full((3,), 0.9), torch.tensor([NAN, 0.7, NAN])):  # the float32 mean of three 0.9 is not 0.9
        found = tempo(grpo(rewards, group, ones(3, 2)), rewards, tokens, full, group, ones(3, 2))
        assert bool((found == 0).all())
    alone = torch.tensor([4.0])
    assert bool((tree_td(alone, tokens[:1], full[:1], group[:1], ones(1, 2)) == 0).all())


def test_rows_without_a_reward_leave_the_tree() -> None:
    with_nan = tree_td(vector(1, NAN, 0), torch.tensor([[1, 2], [1, 2], [1, 3]]), torch.full((3,), 2), ONE_GROUP[:3],
                       ones(3, 2))  # fmt: skip
    close(with_nan, [[0, 0.5], [0, 0], [0, -0.5]])


def test_tool_output_belongs_to_the_transition() -> None:
    # Equal actions, different tool output: the action before it is credited with what the tool returned.
    tokens, lengths = torch.tensor([[1, 8, 2], [1, 9, 2]]), torch.tensor([3, 3])
    mask = torch.tensor([[True, False, True]] * 2)
    close(tree_td(vector(1, 0), tokens, lengths, torch.tensor([0, 0]), mask), [[0.5, 0, 0], [-0.5, 0, 0]])


def test_dropped_rows_stay_in_the_tree() -> None:
    # The group's mean counts them too, so that values and baseline speak of the same sample.
    rollouts = batch_of(TOKENS, REWARDS, FULL, ONE_GROUP).replace(truncated=torch.tensor([True, False, False, False]))
    algorithm = make("tempo", std="none").override(select=["dapo/overlong-filter"])
    found = advantages_of(algorithm, rollouts)
    close(found[1:], UNDIVIDED[1:])
    close(found[0], 0.0)


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("tempo")
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(credit=None)))
    changed = (found != plain).nonzero()
    assert len(changed) > 0
    assert bool((changed[:, 1] == 0).all())  # fifty token ids: these responses share nothing
