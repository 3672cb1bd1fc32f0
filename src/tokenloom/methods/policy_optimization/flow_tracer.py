"""FlowTracer: weight tokens through which attention carries the question to the answer (arXiv 2606.10646).

Every token is a node; an edge leads from i to each later k that looks at it, with W_ik the attention that query k pays
to key i, averaged over heads and the layers of the middle third. Q: the question's tokens; answer: the final answer's.
reach      h = 1 at the answer, elsewhere h_i = sum_k W_ik h_k, right to left; answer tokens have no outgoing edges
law        W'_ik = W_ik h_k / h_i: of what leaves i only what can arrive; each row of a node with h > 0 sums to 1
flow       f_k = [k in Q] / |Q| + sum_i f_i W'_ik, left to right
throughput = f_k + sum_j f_k W'_kj: 2 f inside, f at the answer                                        [B, T]
weights = gamma for the top share of a row's sampled tokens by throughput, 1 for the others            [B, T]
ln h is kept, since h decays with every step, and the rest is float64. Attention of a token to itself is left out; the
token of position 0, which collects attention, can be left out of `question`. Without an answer, or where nothing
arrives, every throughput is 0, a token without flow is never in the top share, and so all weights are 1.
Limit: gamma = 1 is the base, GRPO without KL. Fidelity: paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.top_tokens import counted_up, top_by_row
from tokenloom.signals import attention_signal

PAPER = "arXiv:2606.10646"
BLOCK = 32
"""Tokens within which ln h may fall by no more than float64 holds, 708."""


class Flow(NamedTuple):
    """Of a graph of S nodes, float64: `log_reach` ln h, `flow` f, `throughput` [S]; `law` W' [S, S]."""

    log_reach: Tensor
    law: Tensor
    flow: Tensor
    throughput: Tensor


def trace(weights: Tensor, question: Tensor, answer: Tensor) -> Flow:
    """The flow from `question` to `answer` [S] bool along edges `weights` [S, S], from row i to column k > i.

    >>> w = torch.zeros(5, 5)
    >>> w[0, 2], w[0, 3], w[1, 2], w[1, 3], w[2, 3], w[2, 4], w[3, 4] = 0.4, 0.1, 0.2, 0.3, 0.5, 0.6, 0.3
    >>> places = torch.arange(5)
    >>> found = trace(w, places < 2, places == 4)
    >>> found.log_reach.exp()
    tensor([0.3300, 0.2400, 0.7500, 0.3000, 1.0000], dtype=torch.float64)
    >>> found.flow
    tensor([0.5000, 0.5000, 0.7670, 0.3864, 1.0000], dtype=torch.float64)
    """
    edges = weights.double().triu(1)
    log_edges = torch.where(answer[:, None], torch.zeros_like(edges), edges).log()
    log_reach = _log_reach(log_edges, answer)
    # From a node that reaches nothing leads no edge that could be scaled.
    start = torch.where(log_reach.isfinite(), log_reach, torch.zeros_like(log_reach))
    law = (log_edges + log_reach - start[:, None]).exp()
    source = question.to(law) / question.sum().clamp(min=1)
    flow = _solve(law.T, source, upper=False)
    return Flow(log_reach, law, flow, flow * (1 + law.sum(-1)))


def _log_reach(log_edges: Tensor, answer: Tensor) -> Tensor:
    """ln h [S]: block by block from the right, in logarithms between blocks and on the block's scale within."""
    found = torch.where(answer, 0.0, float("-inf")).to(log_edges)
    for stop in range(len(answer), 0, -BLOCK):
        at = slice(max(0, stop - BLOCK), stop)
        # Straight to an answer, in the block or behind it, or to any token behind it.
        direct = torch.logsumexp(log_edges[at] + found, -1)
        scale = direct.max()
        if bool(scale.isfinite()):
            inner = torch.where(answer[at], torch.zeros_like(log_edges[at, at]), log_edges[at, at].exp())
            inside = _solve(inner, (direct - scale).exp(), upper=True)
            found[at] = torch.where(answer[at], found[at], inside.log() + scale)
    return found


def _solve(edges: Tensor, start: Tensor, *, upper: bool) -> Tensor:
    """x = start + edges x for strictly triangular edges: sums of positive numbers only, so nothing cancels."""
    identity = torch.eye(len(edges), dtype=edges.dtype, device=edges.device)
    found: Tensor = torch.linalg.solve_triangular(identity - edges, start[:, None], upper=upper, unitriangular=True)
    return found[:, 0]


@attention_signal("answer_flow", "attention", "answer_mask", "prompt_length", band=(1 / 3, 2 / 3))
def answer_flow(attention: Tensor, answer_mask: Tensor, prompt_length: int) -> Tensor:
    """Throughput [T] of the response's tokens between the prompt and the answer; 0 where no answer was found."""
    if not bool(answer_mask.any()):
        return attention.new_zeros(len(answer_mask))
    question = torch.arange(len(attention), device=attention.device) < prompt_length
    answer = torch.cat([torch.zeros_like(question[:prompt_length]), answer_mask])
    return trace(attention.T, question, answer).throughput[prompt_length:].to(attention.dtype)


@part("flow-tracer", stage="weight", scope="row", paper=PAPER)
def high_flow(answer_flow: Tensor, mask: Tensor, *, top: float = 0.4, gamma: float = 1.5) -> Tensor:
    """Weights [B, T]: gamma on the ceil(top * length) tokens of each row with the largest throughput above 0, else 1.

    Raises:
        ValueError: for top outside (0, 1], or a negative gamma.
    """
    if not (0 < top <= 1 and gamma >= 0):
        raise ValueError(f"top is a share of tokens in (0, 1] and gamma a weight >= 0; got {top} and {gamma}")
    flow = where_mask(answer_flow.detach(), mask)
    high = top_by_row(flow, mask, counted_up(top, mask)) & (flow > 0)
    return where_mask(1 + (gamma - 1) * high.to(flow.dtype), mask)


@preset("flow-tracer", paper=PAPER)
def flow_tracer_preset(*, top: float = 0.4, gamma: float = 1.5) -> Algorithm:
    """GRPO without KL, high-flow tokens weighted by gamma."""
    base = Algorithm.from_recipe({"preset": "grpo", "kl_coef": 0.0})
    return base.override(weight=[{"part": "flow-tracer", "top": top, "gamma": gamma}])
