"""Speculative sampling: one chain of drafts, checked by the target in one pass (arXiv 2211.17192, 2302.01318).

With the target's law P and the draft's Q at a position:
draft x ~ Q is accepted with probability min(1, P(x) / Q(x)); at the first rejection the token is drawn from
norm(max(P - Q, 0)) and the round ends; after the last accepted draft one more token is drawn from P.
A draft is accepted with probability sum min(P, Q) = 1 - TV(P, Q); drafts of length K that are accepted independently
at rate a give (1 - a^(K+1)) / (1 - a) tokens a round. The result has the law P whatever Q is.

Under greedy decoding, P is all on one token and the rule accepts the drafts that are those tokens.
Limits: P = Q accepts everything. Deviations: none. Fidelity: paper.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree, Laws, Verdict, needed, residual, walk

PAPER = "arXiv:2211.17192"


@part("speculative-sampling", stage="verify", scope="row", paper=PAPER)
def speculative_sampling(tree: DraftTree, laws: Laws, draw: Draw) -> Verdict:
    """The accepted part of a chain (`tree` with one child a node) and the token that follows it.

    Raises:
        ValueError: when a node has several children, or drafts came without their law.
    """
    if any(len(nodes) > 1 for nodes in tree.children.values()):
        raise ValueError("speculative-sampling verifies one chain; recursive-rejection takes trees")
    return walk(tree, laws, draw, _pick)


def _pick(p: Tensor, q: Tensor | None, tokens: list[int], draw: Draw) -> tuple[int | None, int]:
    q = needed(q, "speculative-sampling")
    (token,) = tokens
    if accepts(p, q, token, draw):
        return 0, token
    return None, draw.categorical(residual(p, q))


def accepts(p: Tensor, q: Tensor, token: int, draw: Draw) -> bool:
    """Whether a draft `token` drawn from `q` [V] stands for a draw from `p` [V]: with probability min(1, p / q)."""
    wanted, drafted = float(p[token]), float(q[token])
    return wanted > 0 and (wanted >= drafted or draw.bernoulli(wanted / drafted))


class Tokens(Protocol):
    """M + 1 token ids."""

    def __getitem__(self, i: int, /) -> int:
        """`tokens[i]`."""
        ...


@part("speculative-sampling/greedy", stage="verify", scope="row", paper=PAPER)
def greedy(tree: DraftTree, best: Tokens) -> Verdict:
    """The path of nodes that are what the target would have written, whose token after node i is `best[i + 1]`."""
    path: list[int] = []
    same = [ROOT]
    while True:
        token = int(best[same[0] + 1])
        same = [child for node in same for child in tree.children.get(node, ()) if tree.tokens[child] == token]
        if not same:
            return Verdict(path, token)
        path.append(same[0])


@part("speculative-sampling/acceptance", stage="analysis", scope="row", paper=PAPER)
def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """The probability [...] that a draft from `q` [..., V] is accepted for the target `p` [..., V]."""
    return torch.minimum(p, q).sum(-1)


@part("speculative-sampling/tokens", stage="analysis", scope="row", paper=PAPER)
def expected_tokens(rate: float, *, drafts: int = 4) -> float:
    """Tokens a round when each of `drafts` is accepted at `rate`, independently.

    Raises:
        ValueError: for a rate outside [0, 1] or a negative number of drafts.
    """
    if not 0 <= rate <= 1 or drafts < 0:
        raise ValueError(f"rate is a probability and drafts a number >= 0; got {rate} and {drafts}")
    return float(drafts + 1) if rate == 1 else (1 - rate ** (drafts + 1)) / (1 - rate)
