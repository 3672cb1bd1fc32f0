"""Meta-generation: minimum Bayes risk among candidates, and what a budget of tokens buys (arXiv 2406.16838).

minimum Bayes risk   arg max_i (1/N) sum_j u(y_i, y_j)               u [N, N], the mean over the samples themselves
exact match          u(y_i, y_j) = 1{a_i = a_j}, and 0 where a candidate has no answer
curve                for n = 1..N: mean tokens of the first n candidates, share of questions that their vote gets right

The survey's frame of generators and combinators is `tokenloom.decode.meta_generation`. Limits: with exact match,
minimum Bayes risk is the majority vote, ties included. Deviations: none. Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.self_consistency import Answers, majority


@part("meta-generation", stage="rank", scope="batch", paper="arXiv:2406.16838")
def minimum_bayes_risk(utility: Tensor) -> int:
    """Index of the candidate of the largest mean utility; `utility[i, j]` [N, N] is that of i when j is the truth.

    Among equals the first wins.

    Raises:
        ValueError: when the table is not square, empty, or holds something that is no number.
    """
    if utility.ndim != 2 or utility.shape[0] != utility.shape[1] or utility.shape[0] == 0:
        raise ValueError(f"minimum Bayes risk needs utilities [N, N] of N >= 1 candidates, got {tuple(utility.shape)}")
    means = utility.to(torch.float64).mean(1)
    if bool(means.isnan().any()):
        raise ValueError("minimum Bayes risk needs utilities that are numbers")
    return int((means == means.max()).nonzero()[0])


def exact_match(answers: Answers) -> Tensor:
    """Utilities [N, N], float64: 1 where two of `answers` (N) are equal, 0 where one is None."""
    return torch.tensor(
        [[float(a is not None and a == b) for b in answers] for a in answers], dtype=torch.float64
    ).view(len(answers), len(answers))


@part("meta-generation/curve", stage="analysis", scope="batch", paper="arXiv:2406.16838")
def compute_curve(
    answers: Sequence[Answers], truths: Sequence[Hashable], tokens: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """(mean tokens of a question, accuracy) of the majority vote over the first n candidates, for n = 1..N.

    Questions Q: `answers` Q x N, `truths` Q, `tokens` Q x N, what each candidate cost. Methods are compared at equal
    tokens by reading their curves at one place.

    Raises:
        ValueError: when there is no question, or questions have different numbers of candidates.
    """
    width = len(answers[0]) if answers else 0
    if width == 0 or any(len(a) != width or len(t) != width for a, t in zip(answers, tokens, strict=True)):
        raise ValueError("a curve needs questions with one and the same number of candidates and of token counts")
    curve = []
    for n in range(1, width + 1):
        votes = [a[majority(a[:n])] for a in answers]
        right = [vote is not None and vote == truth for vote, truth in zip(votes, truths, strict=True)]
        cost = sum(sum(t[:n]) for t in tokens) / len(answers)
        curve.append((cost, sum(right) / len(answers)))
    return curve
