"""SpecTr: choose among K independent drafts by optimal transport, nearly, in linear time (arXiv 2310.15141).

K-SEQ with division factor rho in [1, K]: of x_1 ... x_K drawn independently from Q, the first is taken that
passes a coin of probability min(1, P(x_i) / (rho Q(x_i))). With
beta = sum_x min(Q(x), P(x) / rho)           a draft's chance to pass
alpha = 1 - (1 - beta)^K                     one of them passes
the token is drawn, when none does, from [P(x) - min(Q(x), P(x) / rho) alpha / beta] / (1 - alpha). This is a law as
long as alpha <= rho beta; the smallest such rho, where both are equal, is used: acceptance is at least (1 - 1/e) of the
best possible. At the next depth the drafts go on that began with the chosen token, with their number as K.

Limits: K = 1 has rho = 1 and is speculative sampling. Deviations: rho by bisection to the last bit rather than on a
grid. Fidelity: paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import DraftTree, Laws, Verdict, needed, walk

PAPER = "arXiv:2310.15141"
_HALVINGS = 50


@part("spec-tr", stage="verify", scope="row", paper=PAPER)
def spec_tr(tree: DraftTree, laws: Laws, draw: Draw) -> Verdict:
    """The accepted part of `tree`, whose nodes have children drawn independently from their `q`, and a further token.

    K continuations of length L are a tree of K chains below the root.

    Raises:
        ValueError: when drafts came without their law.
    """
    return walk(tree, laws, draw, _pick)


def _pick(p: Tensor, q: Tensor | None, tokens: list[int], draw: Draw) -> tuple[int | None, int]:
    q = needed(q, "spec-tr")
    rho = division_factor(p, q, count=len(tokens))
    for place, token in enumerate(tokens):
        chance = min(1.0, float(p[token]) / (rho * float(q[token])))
        if chance > 0 and (chance >= 1 or draw.bernoulli(chance)):
            return place, token
    return None, draw.categorical(k_seq_residual(p, q, rho, count=len(tokens)))


@part("spec-tr/division", stage="analysis", scope="row", paper=PAPER)
def division_factor(p: Tensor, q: Tensor, *, count: int = 2) -> float:
    """The best rho of `count` drafts from `q` [V] for the target `p` [V], a number in [1, count].

    Raises:
        ValueError: for fewer than one draft.
    """
    if count < 1:
        raise ValueError(f"count is the number of drafts, at least 1; got {count}")
    # Only drafts that may come matter.
    drafted = q > 0
    p, q = p[drafted].double(), q[drafted].double()

    def excess(rho: float) -> float:
        beta = float(torch.minimum(q, p / rho).sum())
        return 1 - (1 - beta) ** count - rho * beta

    low, high = 1.0, float(count)
    if count == 1 or excess(low) <= 0:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


@part("spec-tr/acceptance", stage="analysis", scope="row", paper=PAPER)
def k_seq_acceptance(p: Tensor, q: Tensor, *, count: int = 2) -> float:
    """The probability that one of `count` drafts is taken."""
    beta = float(torch.minimum(q, p / division_factor(p, q, count=count)).sum())
    return 1 - (1 - min(beta, 1.0)) ** count


def k_seq_residual(p: Tensor, q: Tensor, rho: float, *, count: int) -> Tensor:
    """The law [V] of the token when no draft was taken."""
    passing = torch.minimum(q, p / rho)
    beta = float(passing.sum())
    if beta <= 0:
        return p
    alpha = 1 - (1 - min(beta, 1.0)) ** count
    left = (p - passing * (alpha / beta)).clamp(min=0)
    mass = left.sum()
    return left / mass if bool(mass > 0) else p
