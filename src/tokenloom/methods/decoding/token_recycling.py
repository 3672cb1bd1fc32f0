"""Token Recycling: drafts from what the target once found likely after each token (arXiv 2408.08696).

Adjacency matrix M [V, k]: row u holds the k tokens that were most likely when the target last read u, best first.
Draft: below a node with token u, the child of rank j is M[u, j], in a fixed shape of tree. Update: every node of the
tree that the target has read, accepted or not, writes its row; of equal tokens the last node writes.

The shape is `TEMPLATE`: 80 nodes in depths of 8, 21, 25, 15, 8 and 3, found by the authors' search.

Deviations: unknown followers are `NONE` and drafted by nobody (the authors' matrix starts with zeros, which drafts
token 0). The release skips the update in its last pass and may overshoot the length limit; neither is done here.
Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree

PAPER = "arXiv:2408.08696"
NONE = -1
"""What follows a token that was never read."""

# Number of children by path of ranks, and for paths that differ only in the last rank, of all of them.
_CHILDREN = {
    (): 8,
    (0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1,
    (0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1,
    (1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
    (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1,
    (0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}  # fmt: skip


def _template() -> tuple[list[int], list[int]]:
    """Parents and ranks of the nodes, depth after depth."""
    parents, ranks = list[int](), list[int]()
    places: dict[tuple[int, ...], int] = {(): ROOT}
    for path, count in sorted(_CHILDREN.items(), key=lambda item: (len(item[0]), item[0])):
        for rank in range(count):
            places[(*path, rank)] = len(parents)
            parents.append(places[path])
            ranks.append(rank)
    return parents, ranks


TEMPLATE = _template()
"""Parents and ranks of the paper's 80 nodes."""


def empty_adjacency(vocab: int, *, branches: int = 8) -> Tensor:
    """The matrix [V, k] before anything was read, int32."""
    return torch.full((vocab, branches), NONE, dtype=torch.int32)


@part("token-recycling", stage="draft", scope="row", paper=PAPER)
def token_recycling(
    adjacency: Tensor, root: int, template: tuple[Sequence[int], Sequence[int]] = TEMPLATE
) -> DraftTree:
    """The tree below `root`, the last token of the text, that M [V, k] gives to parents and ranks of a template.

    Nodes that would repeat a sibling, follow an unknown token or have a rank beyond k are left out with all below.
    """
    tokens, parents = list[int](), list[int]()
    places: dict[int, int] = {ROOT: ROOT}
    followers: dict[int, list[int]] = {}
    for node, (parent, rank) in enumerate(zip(*template, strict=True)):
        if parent not in places:
            continue
        above = places[parent]
        token = root if above == ROOT else tokens[above]
        if token not in followers:
            followers[token] = list(dict.fromkeys(t for t in adjacency[token].tolist() if t != NONE))
        if rank < len(followers[token]):
            places[node] = len(tokens)
            tokens.append(followers[token][rank])
            parents.append(above)
    return DraftTree(tokens, parents)


@part("token-recycling/update", stage="draft", scope="batch", paper=PAPER)
def update(adjacency: Tensor, read: Tensor, followers: Tensor) -> Tensor:
    """M [V, k] after tokens `read` [N] were found to be followed by `followers` [N, k], best first; the last of equals.

    Writes into `adjacency`, which it returns.
    """
    # Writes to the same row have no order on some devices, so only the last of equal tokens writes.
    last = {token: place for place, token in enumerate(read.tolist())}
    places = torch.tensor(list(last.values()), dtype=torch.int64, device=followers.device)
    rows = torch.tensor(list(last), dtype=torch.int64, device=adjacency.device)
    adjacency[rows] = followers[places].to(adjacency)
    return adjacency
