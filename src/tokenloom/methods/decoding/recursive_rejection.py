"""Recursive rejection: several drafts at a node, each a chance to accept (arXiv 2305.09781, 2402.14160).

p <- P; for drafts x_1 ... x_K of the node: accept x_i with probability min(1, p(x_i) / q(x_i)); else
p <- norm(max(p - q, 0)), and where drafts were drawn without replacement q <- norm(q without x_i).
After K rejections the token is drawn from p. The result has the law P.

Drafts drawn without replacement (`replacement=False`) never repeat a token that was just rejected and are accepted
more often: P = (.5, .3, .2), Q = (.2, .5, .3), K = 2: .8085714 against .76.
Limits: K = 1 is speculative sampling. Deviations: none. Fidelity: paper.
"""

from __future__ import annotations

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import DraftTree, Laws, Verdict, needed, residual, walk
from tokenloom.methods.decoding.speculative_sampling import accepts

PAPER = "arXiv:2305.09781"


@part("recursive-rejection", stage="verify", scope="row", paper=PAPER)
def recursive_rejection(tree: DraftTree, laws: Laws, draw: Draw, *, replacement: bool = False) -> Verdict:
    """The accepted path of `tree` and the token that follows it.

    `replacement` says how the children of a node were drawn from `q`: independently, or each other than those before.

    Raises:
        ValueError: when drafts came without their law.
    """

    def pick(p: Tensor, q: Tensor | None, tokens: list[int], draw: Draw) -> tuple[int | None, int]:
        q = needed(q, "recursive-rejection")
        for place, token in enumerate(tokens):
            if accepts(p, q, token, draw):
                return place, token
            p = residual(p, q)
            if not replacement:
                q = without(q, token)
        return None, draw.categorical(p)

    return walk(tree, laws, draw, pick)


@part("recursive-rejection/draw", stage="draft", scope="row", paper="arXiv:2402.14160")
def distinct(law: Tensor, draw: Draw, *, count: int = 2) -> list[int]:
    """At most `count` different indices of `law` [n], each drawn from what the ones before leave of it.

    This is the order of the largest of log law + Gumbel noise. Fewer when fewer have mass.
    """
    law, chosen = law.clone(), list[int]()
    while len(chosen) < count and bool(law.sum() > 0):
        chosen.append(draw.categorical(law))
        law[chosen[-1]] = 0
    return chosen


def without(law: Tensor, token: int) -> Tensor:
    """`law` [V] when it is not `token`; zeros when nothing is left."""
    rest = law.clone()
    rest[token] = 0
    mass = rest.sum()
    return rest / mass if bool(mass > 0) else rest
