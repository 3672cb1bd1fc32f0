"""Verifiers of speculative decoding: which drafts they take, and the rule that accepts a path of a tree.

With greedy decoding any verifier accepts what the target would have written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenloom.decode.drafters.base import Drawing
from tokenloom.decode.registry import decoder
from tokenloom.draw import Draw
from tokenloom.methods.decoding import prompt_lookup as lookup
from tokenloom.methods.decoding.draft_tree import DraftTree, Laws, Verdict
from tokenloom.methods.decoding.recursive_rejection import recursive_rejection as recursive_rule
from tokenloom.methods.decoding.spec_tr import spec_tr as spec_tr_rule
from tokenloom.methods.decoding.speculative_sampling import speculative_sampling as chain_rule
from tokenloom.methods.decoding.two_step_multi_draft import two_step_multi_draft as two_step_rule

_MANY = 1_000


@dataclass(frozen=True)
class Verifier:
    """A rule and what it asks of drafts.

    Attributes:
        drawing: how the children of a node must come about; "given" takes all, and needs no law.
        branching: most children of the root and of other nodes.
    """

    slug: str
    rule: Callable[[DraftTree, Laws, Draw], Verdict]
    drawing: Drawing
    branching: tuple[int, int] = (_MANY, _MANY)


@decoder("prompt-lookup", kind="verifier")
def matching() -> Verifier:
    """Draws from the target's law and accepts what was drafted so; for drafts that have no law, and all others."""
    return Verifier("prompt-lookup", lookup.verify, "given")


@decoder("speculative-sampling", kind="verifier")
def chain() -> Verifier:
    """Accepts a chain token by token with probability min(1, p/q)."""
    return Verifier("speculative-sampling", chain_rule, "independent", (1, 1))


@decoder("recursive-rejection", kind="verifier")
def recursive(*, replacement: bool = False) -> Verifier:
    """Gives each of several drafts a chance; without `replacement` they are drawn each other than those before."""

    def rule(tree: DraftTree, laws: Laws, draw: Draw) -> Verdict:
        return recursive_rule(tree, laws, draw, replacement=replacement)

    return Verifier("recursive-rejection", rule, "independent" if replacement else "distinct")


@decoder("spec-tr", kind="verifier")
def k_seq() -> Verifier:
    """Takes one of K independent continuations, nearly as often as is possible."""
    return Verifier("spec-tr", spec_tr_rule, "independent", (_MANY, 1))


@decoder("two-step-multi-draft", kind="verifier")
def two_step(*, support: int = 0) -> Verifier:
    """Picks one of several independent drafts, then verifies it alone; `support` tokens by the best pick."""

    def rule(tree: DraftTree, laws: Laws, draw: Draw) -> Verdict:
        return two_step_rule(tree, laws, draw, support=support)

    return Verifier("two-step-multi-draft", rule, "independent")
