"""Two-step multi-draft selection: pick one of K drafts, then verify it alone (arXiv 2410.18234).

Drafts X = (x_1 ... x_K) are drawn independently from Q.
1. pick Y among them, whose law is I(y) = sum_X Pr(X) w(y | X), w the rule of the pick
2. accept Y with probability min(1, P(Y) / I(Y)), else draw from norm(max(P - I, 0))
Any rule gives the law P as long as I is exact; it decides only the acceptance sum min(P, I), of which the best is
P* = 1 + min_S [P(S) - Q(S)^K] over sets S of tokens. A best S holds the tokens with P/Q below some bound (Q^K is
convex in Q(S)), so it is found by sorting.

Rules: "rank" picks the draft with the largest P/Q, I(v) = Q(rank <= v)^K - Q(rank < v)^K; "first" picks x_1, I = Q.
The better of both is taken, since rank may be worse than one draft (P = Q = (.6, .4): .76 against 1). With `support`
= s > 0, draft sets within the s most drafted tokens are picked from as the optimum of the linear program over them
says (a maximum flow), the others by rank; s = V is the optimum.

Limits: K = 1 is speculative sampling. Deviations: the rank rule, and which tokens are in the support, are ours; the
paper solves a program truncated by importance weights. Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import DraftTree, Laws, Verdict, needed, residual, walk
from tokenloom.methods.decoding.speculative_sampling import acceptance, accepts
from tokenloom.methods.decoding.two_step_flow import best_picks

PAPER = "arXiv:2410.18234"
Choice = Callable[[list[int], Draw], int]
"""From the drafted tokens to the one that is picked."""


@part("two-step-multi-draft", stage="verify", scope="row", paper=PAPER)
def two_step_multi_draft(tree: DraftTree, laws: Laws, draw: Draw, *, support: int = 0) -> Verdict:
    """The accepted path of `tree`, whose nodes have children drawn independently from their `q`, and a further token.

    Raises:
        ValueError: when drafts came without their law, or for a negative support.
    """
    if support < 0:
        raise ValueError(f"support is the number of tokens that the program is solved for, 0 or more; got {support}")

    def pick(p: Tensor, q: Tensor | None, tokens: list[int], draw: Draw) -> tuple[int | None, int]:
        law, choose = picking(p, needed(q, "two-step-multi-draft"), count=len(tokens), support=support)
        token = choose(tokens, draw)
        if accepts(p, law, token, draw):
            return tokens.index(token), token
        return None, draw.categorical(residual(p, law))

    return walk(tree, laws, draw, pick)


def picking(p: Tensor, q: Tensor, *, count: int, support: int = 0) -> tuple[Tensor, Choice]:
    """The law [V] of the pick among `count` drafts from `q` [V] for the target `p` [V], and the pick itself."""
    if count == 1:
        return q, lambda tokens, draw: tokens[0]
    rank = ranks(p, q)
    ranked = picked_by_rank(q, rank, count)
    if support:
        kept = q.topk(min(support, int((q > 0).sum()))).indices
        law, choose = _by_program(p, q, kept, rank, ranked, count)
        if acceptance(p, law) >= torch.maximum(acceptance(p, q), acceptance(p, ranked)):
            return law, choose
    if acceptance(p, ranked) > acceptance(p, q):
        return ranked, lambda tokens, draw: min(tokens, key=lambda token: int(rank[token]))
    return q, lambda tokens, draw: tokens[0]


def ranks(p: Tensor, q: Tensor) -> Tensor:
    """The place [V] of each token when those with larger p/q come first, the lower id among equals."""
    order = torch.where(q > 0, p / q, torch.full_like(p, torch.inf)).argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def picked_by_rank(q: Tensor, rank: Tensor, count: int) -> Tensor:
    """The law [V] of the draft of lowest rank among `count` from masses `q` [V]."""
    order = rank.argsort()
    # From the back, so that tokens of rank v and worse are a sum of few terms where it is small.
    behind = q[order].flip(0).cumsum(0).flip(0)
    further = torch.cat((behind[1:], behind.new_zeros(1)))
    return torch.empty_like(q).scatter_(0, order, behind**count - further**count)


@part("two-step-multi-draft/optimum", stage="analysis", scope="row", paper=PAPER)
def optimal_acceptance(p: Tensor, q: Tensor, *, count: int = 2) -> Tensor:
    """The largest acceptance that any verifier reaches with `count` independent drafts from `q` [..., V] for `p`.

    Raises:
        ValueError: for fewer than one draft.
    """
    if count < 1:
        raise ValueError(f"count is the number of drafts, at least 1; got {count}")
    ratio = torch.where(q > 0, p / q, torch.full_like(p, torch.inf))
    order = ratio.argsort(-1)
    value = p.gather(-1, order).cumsum(-1) - q.gather(-1, order).cumsum(-1) ** count
    return 1 + value.min(-1).values.clamp(max=0)


def _by_program(p: Tensor, q: Tensor, kept: Tensor, rank: Tensor, ranked: Tensor, count: int) -> tuple[Tensor, Choice]:
    """The pick by the program's solution within the tokens `kept`, by rank elsewhere."""
    inside = torch.zeros_like(q)
    inside[kept] = q[kept]
    # What falls to a token from draft sets that are not all within.
    law = ranked - picked_by_rank(inside, rank, count)
    law = law.clamp(min=0)
    room = (p - law).clamp(min=0)[kept].tolist()
    picks = best_picks(inside[kept].tolist(), room, rank[kept].tolist(), count)
    place = {int(token): i for i, token in enumerate(kept)}
    for masses in picks.values():
        for i, mass in masses.items():
            law[kept[i]] += mass

    def choose(tokens: list[int], draw: Draw) -> int:
        if any(token not in place for token in tokens):
            return min(tokens, key=lambda token: int(rank[token]))
        masses = picks[frozenset(place[token] for token in tokens)]
        chosen = list(masses)
        weights = torch.tensor([masses[i] for i in chosen], dtype=torch.float64)
        return int(kept[chosen[draw.categorical(weights)]])

    return law, choose
