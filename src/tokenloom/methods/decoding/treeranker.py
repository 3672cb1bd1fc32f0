"""TreeRanker: rank fixed completions by one greedy walk through the trie of their tokens (arXiv 2508.02455).

At each node that branches, one model step scores all children; the walk goes on with the best, the first among equals.
A completion that ends at an inner node is an extra child, END, scored by the mass of `delimiters`, or, without them, by
the mass of all tokens that are no children: log(1 - sum of the children's probabilities).
Order of completions: length of the path shared with the walk (longer first), then the log-prob of the first token off
the walk (higher first), then the order as given.

N completions, each the tokens that continue the context. Deviations: the paper's abstract leaves the key open; this is
our reading. With END scored by the remaining mass, a further child at a node lowers END there, which may reorder it
against its siblings; with delimiters nothing is reordered. Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part

END = -1
"""The child that stands for "the completion ends here"."""

Tokens = tuple[int, ...]


def children_of(completions: Sequence[Tokens], path: Tokens) -> list[int]:
    """What may follow `path` in the trie of `completions`, ascending; `END` first if one of them ends here."""
    below = {c[len(path)] if len(c) > len(path) else END for c in completions if c[: len(path)] == path}
    return sorted(below)


@part("treeranker/children", stage="probe", scope="row", paper="arXiv:2508.02455")
def child_scores(logprobs: Tensor, children: Sequence[int], delimiters: Sequence[int] = ()) -> Tensor:
    """Log-probs [c] of `children` under `logprobs` [V]; see the module for `END`."""
    tokens = [c for c in children if c != END]
    scores = logprobs[torch.tensor(tokens, dtype=torch.int64, device=logprobs.device)]
    if len(tokens) == len(children):
        return scores
    others = [d for d in delimiters if d not in tokens]
    if others:
        end = logprobs[torch.tensor(others, device=logprobs.device)].logsumexp(0)
    else:
        # Summed over the rest, not 1 minus the children: what is left may be far below rounding.
        rest = torch.ones_like(logprobs, dtype=torch.bool)
        rest[tokens] = False
        end = logprobs[rest].logsumexp(0) if bool(rest.any()) else logprobs.new_tensor(-torch.inf)
    return torch.stack([end if c == END else scores[tokens.index(c)] for c in children])


@part("treeranker", stage="rank", scope="batch", paper="arXiv:2508.02455")
def ranking(completions: Sequence[Tokens], walk: Tokens, visited: Mapping[Tokens, Mapping[int, float]]) -> list[int]:
    """Indices of `completions`, best first, after a walk.

    `walk` is the tokens taken, with `END` behind if the walk chose to end; `visited` maps a path that branched to the
    log-probs of its children.
    """

    def key(i: int) -> tuple[int, float, int]:
        whole = (*completions[i], END)
        shared = 0
        while shared < min(len(walk), len(whole)) and walk[shared] == whole[shared]:
            shared += 1
        beyond = visited.get(walk[:shared], {}).get(whole[shared], 0.0) if shared < len(whole) else 0.0
        return -shared, -beyond, i

    return sorted(range(len(completions)), key=key)
