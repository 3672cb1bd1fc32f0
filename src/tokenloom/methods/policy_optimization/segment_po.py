"""SPO: advantages of segments, from Monte-Carlo values at the states between them (arXiv 2505.23564).

Chain: a token is a cut point when its old probability is below `threshold`, and every `every`-th one (the first
included) starts a segment. With V the value of the state before a segment's first token and V = R at the end,
A = V(next segment) - V(segment) on all its tokens; tokens before the first cut get 0, as do those with a
probability above the threshold.                                                                          [B, T]
Tree: segments of `segment` response tokens, `depth` of them, the last one running to the end;
A = V(child) - V(parent), or that over the std of the parent's children (population, + 1e-8). Responses that went
through one edge hold it together, so `edges` weighs it as one training episode, and edges with A = 0 not at all.
Only tokens with a probability below the threshold enter the loss and its normalizer; the chain's advantages are
whitened over them (no Bessel).

The paper draws extra samples at the cut points (`samples` of the preset; their means are `segment_values`) or
branches the responses (`tree_advantages` takes the probability of each row's branches as `row_weights`). Without
extra samples the value of a state is the mean reward of the group's responses that go through it.
Deviations: that default, the library's guard of 20 on log-ratios (10 there), and `skip_ratio`, off by default, since
without several updates per batch the ratio is 1 and it costs a forward pass. Limits: without shared prefixes a chain is
R - mean_g on its first segment and 0 behind. Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import masked_mean, where_mask, whiten
from tokenloom.methods.policy_optimization.prefix_tree import next_decision, prefix_nodes, prefix_values

_PAPER = "arXiv:2505.23564"


@part("segment-po", stage="advantage", scope="group", paper=_PAPER)
def segment_po(
    rewards: Tensor,
    old_logprobs: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    segment_values: Tensor | None = None,
    *,
    threshold: float = 0.9,
    every: int = 5,
) -> Tensor:
    """Chain advantages [B, T] with `segment_values`, or with the values of the group's own prefix tree."""
    if segment_values is not None:
        return chain_advantages(segment_values.to(rewards.dtype), rewards, old_logprobs, mask, threshold=threshold)
    cuts = cut_points(old_logprobs, mask, threshold=threshold, every=every)
    values = prefix_values(prefix_nodes(tokens, lengths, group_ids), rewards, ~rewards.isnan())[:, :-1]
    segment_values = torch.where(cuts, values, torch.full_like(values, float("nan")))
    return chain_advantages(segment_values, rewards, old_logprobs, mask, threshold=threshold)


@part("segment-po/tree", stage="advantage", scope="group", paper=_PAPER)
def segment_tree(
    rewards: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    segment: int = 600,
    depth: int = 3,
    divide: bool = False,
) -> Tensor:
    """Tree advantages [B, T] with each response counting alike, as for responses sampled without branching."""
    return tree_advantages(rewards, tokens, lengths, group_ids, mask, segment=segment, depth=depth, divide=divide)


@part("segment-po/branches", stage="branch", scope="row", paper=_PAPER)
def branches(
    sampler_logprobs: Tensor, mask: Tensor, *, threshold: float = 0.9, every: int = 5, samples: int = 4
) -> Tensor:
    """How many responses to draw from the state before each token, [B, T] int64: `samples` at the cut points.

    Raises:
        ValueError: for fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples is the number of responses per cut point and must be at least 1, got {samples}")
    return samples * cut_points(sampler_logprobs, mask, threshold=threshold, every=every).long()


def cut_points(old_logprobs: Tensor, mask: Tensor, *, threshold: float = 0.9, every: int = 5) -> Tensor:
    """bool [B, T]: tokens before which a value is wanted, the `every`-th of the unlikely ones from the first on.

    Raises:
        ValueError: for an interval below one.
    """
    if every < 1:
        raise ValueError(f"every counts cut points and must be at least 1, got {every}")
    unlikely = mask & (probability(old_logprobs, mask) < threshold)
    return unlikely & ((unlikely.cumsum(-1) - 1) % every == 0)


def chain_advantages(
    segment_values: Tensor, rewards: Tensor, old_logprobs: Tensor, mask: Tensor, *, threshold: float = 0.9
) -> Tensor:
    """Segment advantages [B, T] from `segment_values` [B, T]: the value of the state before token t, NaN where none
    was estimated, so that the finite ones are the cuts. Zero on likely tokens, off the mask, and in rows without a
    reward.

    >>> nan, one = float("nan"), torch.ones(1, 3, dtype=torch.bool)
    >>> chain_advantages(torch.tensor([[0.25, nan, 0.75]]), torch.tensor([1.0]), torch.full((1, 3), -1.0), one)
    tensor([[0.5000, 0.5000, 0.2500]])
    """
    cuts = mask & ~segment_values.isnan()
    values = torch.cat([where_mask(segment_values, cuts), rewards[:, None]], -1)
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    start = torch.where(cuts, place, -1).cummax(-1).values if mask.shape[1] else place
    difference = values.gather(-1, next_decision(cuts)) - values.gather(-1, start.clamp(min=0))
    counted = mask & (start >= 0) & (probability(old_logprobs, mask) <= threshold) & ~rewards.isnan()[:, None]
    return where_mask(difference, counted)


def tree_advantages(
    rewards: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    row_weights: Tensor | None = None,
    *,
    segment: int = 600,
    depth: int = 3,
    divide: bool = False,
) -> Tensor:
    """Edge advantages [B, T]; `row_weights` [B] as in `prefix_values`, by which V(parent) is its children's mean.

    Raises:
        ValueError: for a segment or a depth below one.
    """
    scored = ~rewards.isnan()
    nodes = prefix_nodes(tokens, lengths, group_ids)
    values = prefix_values(nodes, rewards, scored, row_weights)
    start, end = _edges(lengths, mask, segment, depth)
    edge = values.gather(-1, end) - values.gather(-1, start)
    if divide:
        for level in range(depth):
            parent = lengths.clamp(max=level * segment)[:, None]
            child = lengths.clamp(max=(level + 1) * segment)[:, None] if level < depth - 1 else lengths[:, None]
            gap = (values.gather(-1, child) - values.gather(-1, parent)).squeeze(-1)
            std = prefix_values(nodes.gather(-1, parent), gap**2, scored, row_weights).sqrt()
            edge = torch.where(start == level * segment, edge / (std + 1e-8), edge)
    return where_mask(edge, mask & scored[:, None])


@part("segment-po/edges", stage="weight", scope="group", paper=_PAPER)
def edges(
    advantages: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    segment: int = 600,
    depth: int = 3,
) -> Tensor:
    """Weights [B, T]: 1 over the number of rows that share the token's edge, 0 where its advantage is 0."""
    nodes = prefix_nodes(tokens, lengths, group_ids)
    _, end = _edges(lengths, mask, segment, depth)
    child, trained = nodes.gather(-1, end), mask & advantages.ne(0)
    # Node numbers grow along a row, so a trained token above all earlier ones is the first of its edge.
    reached = torch.where(trained, child, -1)
    reached = reached.cummax(-1).values if mask.shape[1] else reached
    before = torch.cat([reached.new_full((len(mask), 1), -1), reached[:, :-1]], -1)[:, : mask.shape[1]]
    rows = torch.bincount(child[trained & (child > before)], minlength=int(nodes.max()) + 1 if nodes.numel() else 0)
    return where_mask(1 / rows.clamp(min=1).to(advantages.dtype)[child], trained)


@part("segment-po/probability-mask", stage="weight", scope="token", paper=_PAPER)
def probability_mask(old_logprobs: Tensor, mask: Tensor, *, threshold: float = 0.9) -> Tensor:
    """Weights [B, T]: 1 on tokens whose old probability is below the threshold, else 0."""
    return (mask & (probability(old_logprobs, mask) < threshold)).to(old_logprobs.dtype)


@part("segment-po/whiten", stage="credit", scope="batch", paper=_PAPER)
def whiten_unlikely(
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor | None = None,
    *,
    threshold: float = 0.9,
    eps: float = 1e-8,
) -> Tensor:
    """Advantages [B, T] with mean 0 and population variance 1 over the tokens of the loss, zero on the others.

    Rows without a reward have no say in the mean and stay zero.
    """
    counted = mask & (probability(old_logprobs, mask) < threshold)
    if rewards is not None:
        counted = counted & ~rewards.isnan()[:, None]
    return whiten(advantages, counted, eps=eps, correction=0)


@part("segment-po/skip", stage="credit", scope="batch", paper=_PAPER)
def skip(advantages: Tensor, ratio: Tensor, mask: Tensor, *, limit: float = 10.0) -> Tensor:
    """Advantages [B, T], all zero when the mean ratio of an update's tokens exceeds `limit`."""
    return where_mask(advantages, mask) * float(masked_mean(ratio.detach(), mask) <= limit)


def probability(old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(old_logprobs) on the mask, [B, T]; 1 elsewhere."""
    return where_mask(old_logprobs.detach(), mask).exp()


def _edges(lengths: Tensor, mask: Tensor, segment: int, depth: int) -> tuple[Tensor, Tensor]:
    """Index of the state at the start and at the end of each token's segment, [B, T] int64."""
    if segment < 1 or depth < 1:
        raise ValueError(f"a tree needs segment >= 1 token and depth >= 1 level, got {segment} and {depth}")
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    level = (place // segment).clamp(max=depth - 1)
    until = torch.where(level < depth - 1, (level + 1) * segment, mask.shape[1])
    return level * segment, torch.minimum(until, lengths[:, None])


@preset("segment-po", paper=_PAPER)
def segment_po_preset(
    *,
    kind: Literal["chain", "tree"] = "chain",
    threshold: float = 0.9,
    every: int = 5,
    whitened: bool = True,
    segment: int = 600,
    depth: int = 3,
    divide: bool = False,
    samples: int = 0,
    kl_coef: float = 1e-4,
    skip_ratio: float | None = None,
) -> Algorithm:
    """SPO-chain or SPO-tree: PPO's clip on unlikely tokens, a small k3 KL to the reference on the same tokens.

    `samples` > 0 draws that many responses at every cut point of a chain (the paper: 4 to 9); 0 takes the values of
    the group's own responses.
    """
    chain = kind == "chain"
    unlikely: dict[str, Any] = {"part": "segment-po/probability-mask", "threshold": threshold}
    tree = {"segment": segment, "depth": depth}
    credit = [{"part": "segment-po/whiten", "threshold": threshold}] if chain and whitened else []
    over = {"part": "token-mean", "count": "weights"}
    kl = {"part": "kl", "coef": kl_coef, "weight": [unlikely], "aggregate": over}
    own = {"part": "segment-po", "threshold": threshold, "every": every}
    return Algorithm.compose(
        advantage=own if chain else {"part": "segment-po/tree", "divide": divide} | tree,
        credit=credit + ([{"part": "segment-po/skip", "limit": skip_ratio}] if skip_ratio is not None else []),
        weight=[unlikely] + ([] if chain else [{"part": "segment-po/edges"} | tree]),
        branch={"part": "segment-po/branches", "threshold": threshold, "every": every, "samples": samples}
        if chain and samples
        else None,
        surrogate="ppo-clip",
        aggregate=over,
        terms=[kl] if kl_coef else [],
    )
