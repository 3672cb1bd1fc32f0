"""FlowTracer: the worked graph, conservation, every path summed, depth beyond any float, and the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    row,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization import flow_tracer
from tokenloom.methods.policy_optimization.flow_tracer import answer_flow, high_flow, trace
from tokenloom.signals import ATTENTION_SIGNALS

PLACES = torch.arange(5)


def worked() -> Tensor:
    w = torch.zeros(5, 5, dtype=torch.float64)
    w[0, 2], w[0, 3], w[1, 2], w[1, 3], w[2, 3], w[2, 4], w[3, 4] = 0.4, 0.1, 0.2, 0.3, 0.5, 0.6, 0.3
    return w


def attention(size: int, seed: int = 0, sharp: float = 2.0) -> Tensor:
    """A causal map [S, S], query by key, whose rows sum to 1."""
    scores = sharp * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf")).softmax(-1)


def by_paths(weights: Tensor, question: Tensor, answer: Tensor) -> Tensor:
    """Throughput [S] from all paths one by one: each source spreads 1/|Q| over its paths by their products."""
    size = len(weights)
    flow = torch.zeros(size, dtype=torch.float64)
    left = torch.zeros(size, dtype=torch.float64)
    inner = [i for i in range(size) if not bool(answer[i])]
    for source in question.nonzero()[:, 0].tolist():
        found: list[tuple[tuple[int, ...], float]] = []
        if bool(answer[source]):
            found.append(((source,), 1.0))
        for count in range(size if not bool(answer[source]) else 0):
            for middle in itertools.combinations([i for i in inner if i > source], count):
                for end in answer.nonzero()[:, 0].tolist():
                    path = (source, *middle, end)
                    steps = [float(weights[a, b]) for a, b in itertools.pairwise(path) if a < b]
                    if len(steps) == len(path) - 1:
                        found.append((path, float(torch.tensor(steps, dtype=torch.float64).prod())))
        total = sum(weight for _, weight in found)
        if total == 0:
            flow[source] += 1 / float(question.sum())
            continue
        for path, weight in found:
            share = weight / total / float(question.sum())
            flow[list(path)] += share
            left[list(path[:-1])] += share
    return flow + left


def test_defaults() -> None:
    assert defaults("flow-tracer") == {"top": 0.4, "gamma": 1.5}
    assert preset_defaults("flow-tracer") == {"top": 0.4, "gamma": 1.5}
    assert ATTENTION_SIGNALS["answer_flow"].band == (1 / 3, 2 / 3)


def test_what_it_needs() -> None:
    algorithm = make("flow-tracer")
    assert algorithm.loss_needs == {"logprobs"}
    assert algorithm.needs == {"answer_flow"}
    assert algorithm.rollout_needs == {"answer_mask"}


def test_worked_graph() -> None:
    found = trace(worked(), PLACES < 2, PLACES == 4)
    close(found.log_reach.exp(), vector(0.33, 0.24, 0.75, 0.3, 1))
    close(found.flow, vector(0.5, 0.5, 0.7670, 0.3864, 1), 1e-4)
    # 0.5 (0.4 * 0.75 / 0.33 + 0.2 * 0.75 / 0.24) and so on, with exact fractions.
    inner = 0.5 * (0.3 / 0.33 + 0.15 / 0.24)
    late = 0.5 * (0.03 / 0.33 + 0.09 / 0.24) + inner * 0.15 / 0.75
    close(found.flow, vector(0.5, 0.5, inner, late, 1))
    close(found.throughput, vector(1, 1, 2 * inner, 2 * late, 1))
    close(found.law.sum(-1), vector(1, 1, 1, 1, 0))


@pytest.mark.parametrize("seed", range(4))
def test_throughput_is_the_sum_over_all_paths(seed: int) -> None:
    weights = attention(8, seed).T
    places = torch.arange(8)
    question, answer = places < 3, (places == 5) | (places == 7)
    if seed == 3:
        weights = weights.clone()
        weights[1] = 0.0  # a question token that nobody looks at
        answer = places == 5  # and tokens behind the answer
    close(trace(weights, question, answer).throughput, by_paths(weights, question, answer))


def test_conservation_on_attention_maps() -> None:
    # Several blocks, answer tokens in two of them.
    places = torch.arange(90)
    answer = (places >= 85) | (places == 50)
    for seed in range(3):
        found = trace(attention(90, seed).T, places < 12, answer)
        close(found.law.sum(-1), (~answer).double())
        close(found.flow[answer].sum(), 1.0)
        close(found.throughput, (2 - answer.double()) * found.flow)
        assert bool((found.flow >= 0).all())
        # What passes a cut of the sequence is what was injected before it and has not arrived yet.
        for cut in (12, 30, 64):
            passing = (found.flow[:cut, None] * found.law[:cut, cut:]).sum()
            close(passing, 1 - found.flow[answer & (places < cut)].sum())


@pytest.mark.parametrize("block", [1, 3, 7])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = torch.arange(40)
    answer = (places == 22) | (places >= 38)
    whole = trace(attention(40).T, places < 9, answer)
    monkeypatch.setattr(flow_tracer, "BLOCK", block)
    for one, other in zip(trace(attention(40).T, places < 9, answer), whole, strict=True):
        close(one, other)


def test_scaling_what_leaves_a_node_leaves_its_law() -> None:
    weights, places = attention(20).T, torch.arange(20)
    scaled = weights.clone()
    scaled[4] *= 7.0
    one, other = (trace(w, places < 5, places == 19) for w in (weights, scaled))
    close(other.law[4], one.law[4])
    # Those before it prefer it now; those behind it do not see the change.
    close(other.law[5:], one.law[5:])
    assert float(other.law[3, 4]) > float(one.law[3, 4])
    close(other.log_reach[4] - one.log_reach[4], math.log(7.0))


def test_only_edges_forward_are_read() -> None:
    weights = worked() + torch.full((5, 5), float("nan")).tril().nan_to_num(99.0).tril()
    close(trace(weights, PLACES < 2, PLACES == 4).throughput, trace(worked(), PLACES < 2, PLACES == 4).throughput)


def test_tokens_behind_the_answer_and_dead_ends_carry_nothing() -> None:
    weights = attention(9).T.clone()
    weights[5] = 0.0
    places = torch.arange(9)
    found = trace(weights, places < 3, places == 6)
    assert bool((found.throughput[[5, 7, 8]] == 0).all())
    assert bool(found.law.isfinite().all())
    assert bool((found.law[:, 5] == 0).all())
    close(found.flow[6], 1.0)


def test_depth_beyond_any_float() -> None:
    # A chain of 300 steps of 1e-5 reaches the answer with 1e-1500, and a side branch takes a third of the flow.
    size = 301
    weights = torch.zeros(size, size, dtype=torch.float64)
    weights[torch.arange(size - 1), torch.arange(1, size)] = 1e-5
    weights[0, 2] = 0.5e-10
    places = torch.arange(size)
    found = trace(weights, places == 0, places == size - 1)
    assert float(found.log_reach[0]) < -3000
    close(found.flow[1], 2 / 3)
    close(found.flow[2:], 1.0)


def test_the_first_token_can_be_left_out_as_a_source() -> None:
    weights, places = attention(12).T, torch.arange(12)
    found = trace(weights, (places < 4) & (places > 0), places >= 10)
    assert float(found.flow[0]) == 0.0
    close(found.flow[places >= 10].sum(), 1.0)


def test_the_signal_reads_the_response() -> None:
    a = attention(10)
    places = torch.arange(10)
    answer = torch.tensor([False, False, False, True, True, False])
    found = answer_flow(a.float(), answer, 4)
    wanted = trace(a.T, places < 4, (places == 7) | (places == 8)).throughput[4:]
    assert found.dtype == torch.float32
    # A float32 map and float32 result: sums of ten terms.
    close(found.double(), wanted, 1e-6)
    assert float(found[5]) == 0.0
    assert bool((answer_flow(a, torch.zeros(6, dtype=torch.bool), 4) == 0).all())


def test_weights_worked_by_hand() -> None:
    flow = row(0.1, 0.9, 0.5, 0.0, 0.7)
    close(high_flow(flow, ones(1, 5)), row(1, 1.5, 1, 1, 1.5))
    close(high_flow(flow, ones(1, 5), top=0.41), row(1, 1.5, 1.5, 1, 1.5))
    mask = torch.tensor([[True, False, True, True, True]])
    close(high_flow(flow, mask, top=0.25), row(1, 0, 1, 1, 1.5))
    # A token without flow is never among the high ones, and without an answer nobody is.
    close(high_flow(flow, ones(1, 5), top=1.0, gamma=3.0), row(3, 3, 3, 1, 3))
    close(high_flow(torch.zeros(2, 5).double(), ones(2, 5)), 1.0)


@pytest.mark.parametrize("settings", [{"top": 0.0}, {"top": 1.1}, {"gamma": -0.5}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="top"):
        high_flow(row(1.0), ones(1), **settings)


def test_without_gain_it_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    grpo = coefficients_of(make("grpo", kl_coef=0.0), rollouts, signals)
    close(coefficients_of(make("flow-tracer", gamma=1.0), rollouts, signals), grpo)
    plan = make("flow-tracer").plan(rollouts, signals)
    close(coefficients_of(make("flow-tracer"), rollouts, signals), plan.values["weights"] * grpo)
    assert set(plan.values["weights"][rollouts.mask].tolist()) == {1.0, 1.5}
