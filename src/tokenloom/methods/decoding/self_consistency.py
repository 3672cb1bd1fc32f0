"""Self-consistency: the answer that most candidates agree on (arXiv 2203.11171).

majority           arg max over answers a of #{i : a_i = a}
weighted majority  arg max over answers a of sum of w_i over {i : a_i = a},    w_i >= 0
majority of top m  the majority among the m candidates of the largest scores

All three give the index of the first candidate that has the winning answer; among equals the answer seen first wins.
A candidate whose answer is None (nothing could be parsed) does not vote and takes no place among the top m; when nobody
votes the result is 0. N candidates; answers are anything that can be compared and hashed.

Limits: constant weights, or m >= N, are the plain majority; m = 1 is best-of-N. Deviations: none; the paper also tries
weights and finds them no better. Fidelity: paper.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor

from tokenloom.catalog import part

Answers = Sequence[Hashable]


@part("self-consistency", stage="rank", scope="batch", paper="arXiv:2203.11171")
def majority(answers: Answers) -> int:
    """Index of the first of `answers` (N) that has the most frequent answer.

    Raises:
        ValueError: when there is no candidate.
    """
    return _winner(answers, [1.0] * len(answers))


@part("self-consistency/weighted-majority", stage="rank", scope="batch", paper="arXiv:2203.11171")
def weighted_majority(answers: Answers, weights: Sequence[float] | Tensor) -> int:
    """Index of the first of `answers` (N) that has the answer of the largest summed weight (N, finite, >= 0).

    Raises:
        ValueError: when there is no candidate, or for weights of another number or below 0.
    """
    given = _numbers(weights, len(answers), "weights")
    if any(w < 0 or math.isinf(w) for w in given):
        raise ValueError("a weighted vote needs finite weights >= 0; take the exponential of log-probs")
    return _winner(answers, given)


@part("self-consistency/majority-of-top-m", stage="rank", scope="batch", paper="arXiv:2203.11171")
def majority_of_top_m(answers: Answers, scores: Sequence[float] | Tensor, *, m: int = 16) -> int:
    """Index of the majority among the `m` best by `scores` (N); among equal scores the first is better.

    Raises:
        ValueError: when there is no candidate, for m < 1, or scores of another number or that are no numbers.
    """
    if m < 1:
        raise ValueError(f"a vote of the top m needs m >= 1, got {m}")
    given = _numbers(scores, len(answers), "scores")
    voters = [i for i, answer in enumerate(answers) if answer is not None]
    best = set(sorted(voters, key=lambda i: -given[i])[:m])
    return majority([a if i in best else None for i, a in enumerate(answers)])


def _winner(answers: Answers, weights: Sequence[float]) -> int:
    if len(answers) == 0:
        raise ValueError("a vote needs at least one candidate")
    first: dict[Hashable, int] = {}
    votes: dict[Hashable, list[float]] = {}
    for i, (answer, weight) in enumerate(zip(answers, weights, strict=True)):
        if answer is not None:
            first.setdefault(answer, i)
            votes.setdefault(answer, []).append(weight)
    if not votes:
        return 0
    # Rounded once per answer, so that equal weights in another order make no winner.
    return first[max(votes, key=lambda answer: math.fsum(votes[answer]))]


def _numbers(given: Iterable[float] | Tensor, n: int, name: str) -> list[float]:
    values = [float(x) for x in (given.tolist() if isinstance(given, Tensor) else given)]
    if len(values) != n or any(math.isnan(x) for x in values):
        raise ValueError(f"a vote among {n} candidates needs {n} {name}, all of them numbers; got {values}")
    return values
