"""What drafters hand to verifiers: a tree of guessed tokens below the text so far, and the walk of a verifier down it.

Node i of a tree of M nodes holds token x_i and has a parent before it, or `ROOT`, the text itself. Children of a node
stand in the order in which they were drawn. `laws[0]` [V] is the target's law of what follows the text, `laws[i + 1]`
that of what follows node i, both after all processors.

Several nodes may hold the same token after the same tokens (drafts drawn with replacement). The walk keeps all of
them: their children are further draws from the same law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenloom.draw import Draw

ROOT = -1
SparseLaw = tuple[Tensor, Tensor]
"""Token ids [n] and their probabilities [n]; all others have none."""
Pick = Callable[[Tensor, Tensor | None, list[int], Draw], tuple[int | None, int]]
"""From the target's law [V], the draft's [V] and the drafted tokens to the place of the accepted one, None when none
was, and the token that comes next, which is the accepted one if there is one."""


class Laws(Protocol):
    """M + 1 laws [V]: a tensor [M + 1, V], or what makes them when asked for."""

    def __getitem__(self, i: int, /) -> Tensor:
        """`laws[i]`."""
        ...


class Verdict(NamedTuple):
    """The accepted nodes from the root down, and the token that follows the last of them."""

    path: list[int]
    bonus: int


@dataclass(frozen=True)
class DraftTree:
    """Tokens and parents of M nodes. `q` holds, by parent, the law from which its children were drawn.

    Raises:
        ValueError: for a parent that does not come before its node.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    q: Mapping[int, Tensor | SparseLaw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents; give one to each")
        for i, parent in enumerate(self.parents):
            if not ROOT <= parent < i:
                raise ValueError(f"node {i} has the parent {parent}; parents come before their children, {ROOT} is all")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Nodes by parent, in order."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found

    def draft_law(self, parent: int, like: Tensor) -> Tensor | None:
        """The law [V] of the children of `parent` in the format of `like`; None when they were not drawn."""
        law = self.q.get(parent)
        if law is None:
            return None
        if isinstance(law, Tensor):
            return law.to(like)
        ids, probs = law
        return torch.zeros_like(like).scatter_(0, ids.to(like.device), probs.to(like))


def walk(tree: DraftTree, laws: Laws, draw: Draw, pick: Pick) -> Verdict:
    """Go down the tree as `pick` decides at each node, until it accepts no child or there is none.

    Below the last accepted node nothing was drafted: the token is drawn from the target's law.
    """
    path: list[int] = []
    same = [ROOT]  # nodes that stand for the text accepted so far
    while True:
        nodes = [child for node in same for child in tree.children.get(node, ())]
        law = laws[same[0] + 1]
        if not nodes:
            return Verdict(path, draw.categorical(law))
        law = law.to(torch.promote_types(law.dtype, torch.float32))
        tokens = [tree.tokens[node] for node in nodes]
        place, token = pick(law, tree.draft_law(tree.parents[nodes[0]], law), tokens, draw)
        if place is None:
            return Verdict(path, token)
        same = [node for node, held in zip(nodes, tokens, strict=True) if held == token]
        path.append(same[0])


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0) normalized, [V]: what is left of a target when a draft was rejected; `p` when nothing is left."""
    left = (p - q).clamp(min=0)
    mass = left.sum()
    # Nothing but rounding is left when q covers p, and then no draft is rejected.
    return left / mass if bool(mass > 0) else p


def needed(q: Tensor | None, verifier: str) -> Tensor:
    """`q`, which this verifier cannot do without.

    Raises:
        ValueError: when the drafts came without their law.
    """
    if q is None:
        raise ValueError(
            f"{verifier} compares the target's law with the law that drafts were drawn from, and these came without; "
            "verify drafts that were not drawn with prompt-lookup/verify"
        )
    return q
