"""ICN: explore next tokens far from those explored, by showing the model its earlier answers (arXiv 2410.02284).

Round: the prompt lists the answers found so far; the most probable next tokens that no answer has begun with, in order
of probability, are taken, n_tol of them; each is completed from the prompt WITHOUT the list. Nothing is drawn.
Analysis: tokens are clustered by their rows of the output matrix (k-means, 1,024 clusters); next tokens outside the
cluster of the top prediction are compared with those inside.

Defaults: 10 tokens a round for 10 rounds (knowledge, open generation), 1 a round for 4 rounds (reasoning paths), pool
of the 100 best; fewer tokens come back once the pool is used up. V vocabulary, Q questions, K ranked tokens.
Deviations: none. Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable

import torch
from torch import Tensor

from tokenloom.catalog import part


def _itself(token: int) -> Hashable:
    return token


@part("icn", stage="choose", scope="row", paper="arXiv:2410.02284")
def unexplored(
    scores: Tensor,
    explored: Collection[Hashable],
    name: Callable[[int], Hashable] = _itself,
    *,
    n_tol: int = 10,
    pool: int = 100,
) -> list[int]:
    """At most `n_tol` of the `pool` best tokens by `scores` [V], best first, with names not in `explored` nor equal.

    `name` says what makes tokens the same, such as their text; among equal scores the lowest id is first.

    Raises:
        ValueError: for n_tol < 1 or pool < 1.
    """
    if n_tol < 1 or pool < 1:
        raise ValueError(f"icn needs n_tol >= 1 and pool >= 1, got {n_tol} and {pool}")
    seen, taken = set(explored), list[int]()
    for token in scores.sort(descending=True, stable=True).indices[:pool].tolist():
        if name(token) not in seen and len(taken) < n_tol:
            seen.add(name(token))
            taken.append(token)
    return taken


@part("icn/clusters", stage="analysis", scope="batch", paper="arXiv:2410.02284")
def key_clusters(rows: Tensor, generator: torch.Generator, *, k: int = 1024, iterations: int = 20) -> Tensor:
    """Clusters [V], int64 in [0, k), of the output matrix's `rows` [V, D]: Lloyd's algorithm from k random rows.

    Raises:
        ValueError: unless 1 <= k <= V.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"icn clusters {len(rows)} rows into 1 to {len(rows)} clusters, got k = {k}")
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    start = torch.randperm(len(rows), generator=generator, device=generator.device)[:k].to(rows.device)
    centers = rows[start].clone()
    found = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(iterations):
        # |x - c|^2 without |x|^2, which is the same for all centers.
        nearest = (centers.square().sum(1) - 2 * rows @ centers.T).argmin(1)
        if torch.equal(nearest, found):
            break
        found = nearest
        sizes = torch.bincount(found, minlength=k)
        sums = torch.zeros_like(centers).index_add_(0, found, rows)
        # A center that lost all its rows stays where it was.
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centers)
    return found


@part("icn/cluster-gap", stage="analysis", scope="batch", paper="arXiv:2410.02284")
def cluster_gap(tokens: Tensor, correct: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Accuracy of next tokens inside and outside the cluster of the top one; NaN where there is none.

    `tokens` [Q, K] are ranked predictions, `correct` [Q, K] bool what each led to, `clusters` [V]. The top prediction
    itself counts on neither side.
    """
    of = clusters[tokens]
    inside = of[:, 1:] == of[:, :1]
    right = correct[:, 1:].double()
    return float(right[inside].mean()), float(right[~inside].mean())
