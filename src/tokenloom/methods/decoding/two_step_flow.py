"""The best pick among drafts, as a maximum flow: from sets of drafted tokens to tokens with room in the target.

maximize sum_y s_y   with s_y <= room(y), s_y <= sum_A Pr(A) w(y | A), w(. | A) a law on the tokens of the set A
A flow of s_y from sets (as much as they are probable) through their tokens. K draws hold exactly the tokens of A with
probability sum over T in A of (-1)^(|A| - |T|) Q(T)^K. Part of the two-step multi-draft selection (arXiv 2410.18234);
exponential in K, so for few drafts and few tokens. Fidelity: paper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import combinations, pairwise

Set = frozenset[int]
_LEAST = 1e-15


def best_picks(
    q: Sequence[float], room: Sequence[float], rank: Sequence[int], count: int
) -> dict[Set, dict[int, float]]:
    """For every set of tokens that `count` draws from masses `q` may hold, how much of its mass falls to each token.

    What no token has room for falls to the token of lowest `rank`.
    """
    masses = draft_sets(q, count)
    sets = list(masses)
    flow: dict[Set, dict[int, float]] = {A: dict.fromkeys(sorted(A, key=lambda i: rank[i]), 0.0) for A in sets}
    left, free = dict(masses), list(room)
    holders: list[list[Set]] = [[A for A in sets if i in A] for i in range(len(q))]
    while path := _augmenting(sets, left, free, flow, holders):
        # A path is a set, a token, a set that gives way there, its other token, ...
        amount = min(left[path[0][0]], free[path[-1][1]], *(flow[A][before] for (_, before), (A, _) in pairwise(path)))
        left[path[0][0]] -= amount
        free[path[-1][1]] -= amount
        for (_, before), (A, _) in pairwise(path):
            flow[A][before] -= amount
        for A, token in path:
            flow[A][token] += amount
    for A in sets:
        flow[A][next(iter(flow[A]))] += left[A]
    return flow


def draft_sets(q: Sequence[float], count: int) -> dict[Set, float]:
    """The probability that `count` draws from masses `q` hold exactly these tokens, for every set that may come."""
    inside = {Set(T): sum(q[i] for i in T) ** count for n in range(count + 1) for T in combinations(range(len(q)), n)}
    found = {}
    for A in inside:
        mass = sum(
            (-1) ** (len(A) - n) * inside[Set(T)] for n in range(1, len(A) + 1) for T in combinations(sorted(A), n)
        )
        if A and all(q[i] > 0 for i in A):
            found[A] = max(mass, 0.0)
    return found


def _augmenting(
    sets: Sequence[Set],
    left: dict[Set, float],
    free: Sequence[float],
    flow: dict[Set, dict[int, float]],
    holders: Sequence[Sequence[Set]],
) -> list[tuple[Set, int]]:
    """The shortest way from a set with mass left to a token with room; empty when there is none."""
    came: dict[Set, tuple[Set, int] | None] = {A: None for A in sets if left[A] > _LEAST}
    waiting, seen = deque(came), set[int]()
    while waiting:
        at = waiting.popleft()
        for token in flow[at]:
            if token in seen:
                continue
            seen.add(token)
            if free[token] > _LEAST:
                path, step = [(at, token)], came[at]
                while step is not None:
                    path.insert(0, step)
                    step = came[step[0]]
                return path
            for other in holders[token]:
                if other not in came and flow[other][token] > _LEAST:
                    came[other] = (at, token)
                    waiting.append(other)
    return []
