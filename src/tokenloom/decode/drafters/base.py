"""What a drafter is: it guesses, for each row, a tree of tokens behind the text, and learns from what came true.

Letters: B live rows, n tokens of a row in the last forward, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokenloom.decode.drafters.best_first import Grown, Limits
from tokenloom.decode.drafters.shapes import NOTHING, Shape
from tokenloom.decode.run import Run
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree, SparseLaw
from tokenloom.methods.decoding.recursive_rejection import distinct
from tokenloom.rollout.native.session import largest_scores

Drawing = Literal["given", "independent", "distinct"]
"""How the children of a node come about: the likeliest ones, draws from one law, or draws each other than before."""


@dataclass(frozen=True)
class Ask:
    """A row that wants drafts; `text` is its prompt and what it has written, `row` its number in the batch."""

    row: int
    text: list[int]
    shape: Shape
    drawing: Drawing
    draw: Draw


@dataclass(frozen=True)
class Round:
    """What became of a row's drafts: `path` was accepted below `text`, then came `bonus`."""

    row: int
    text: list[int]
    tree: DraftTree
    path: list[int]
    bonus: int
    at: list[int]
    """Where the scores behind the text and each node of the path are found."""
    shaped: list[Tensor] | None
    """Those scores [V] after all processors; None when there are none."""


class Drafter(ABC):
    """Base of drafters: subclasses write `draft`, and what else they need.

    Attributes:
        slug: what messages call it.
        draws: whether it can draw, and say from which law.
        keys, guess: classes of chances that `key` tells apart, and a first guess of the chance of each rank.
        branching: most children of the root and of other nodes that it can think of.
        depth: of its deepest drafts.
        fixed: the one shape that it always drafts; None: as large as pays.
        forbidden: tokens that are no text and never written.
        misses: whether it may be told of some rounds only, while no drafts are made.
    """

    slug = ""
    draws = False
    keys = 1
    guess: Sequence[float] = (0.5,)
    branching = (1, 1)
    depth = 10
    fixed: Shape | None = None
    forbidden: tuple[int, ...] = ()
    misses = False

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """Around a whole run; refuses what it cannot draft for by a ValueError."""
        yield

    def key(self, row: int, text: list[int]) -> int | None:
        """The class of chances of drafts behind `text`; None: there are none."""
        return 0

    def grown(self, text: list[int], drawing: Drawing, limits: Limits) -> Grown | None:
        """The shape that is likeliest to come true behind `text`; None: that follows from the class of chances."""
        return None

    @abstractmethod
    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """The trees of all live rows, in their order; shapes without nodes get `EMPTY`."""

    def probes(self, ask: Ask, tree: DraftTree) -> tuple[list[int], list[int]]:
        """Tokens and parents of nodes, behind those of `tree`, that are read along with it for their scores alone."""
        return [], []

    def probed(self, drafts: int) -> int:
        """The number of probes of a tree of `drafts` nodes."""
        return 0

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:  # noqa: B027  # not all do
        """Scores [B, n, V] as the model gave them: behind the text, behind each node, each probe; then fillers."""

    def keep(self, places: Sequence[int]) -> None:  # noqa: B027  # not all hold something of their rows
        """Go on with the live rows at these places."""


EMPTY = DraftTree([], [])
Followers = Callable[[list[int], int], tuple[list[int], Tensor | SparseLaw | None]]
"""From the tokens of a path and how many children are wanted to their tokens, and the law they were drawn from."""


def filled(shape: Shape, followers: Followers) -> DraftTree:
    """The tree of `shape` with tokens by `followers`; where those are fewer, nodes are left out with all below."""
    if not len(shape):
        return EMPTY
    tokens, parents = list[int](), list[int]()
    paths: dict[int, list[int]] = {ROOT: []}
    places = {ROOT: ROOT}
    known: dict[int, list[int]] = {}
    q: dict[int, Tensor | SparseLaw] = {}
    for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
        if parent not in places:
            continue
        above = places[parent]
        if above not in known:
            known[above], law = followers(paths[above], shape.children[parent])
            if law is not None:
                q[above] = law
        if rank < len(known[above]):
            places[node] = len(tokens)
            paths[len(tokens)] = [*paths[above], known[above][rank]]
            tokens.append(known[above][rank])
            parents.append(above)
    return DraftTree(tokens, parents, q)


def drawn(law: Tensor, count: int, drawing: Drawing, draw: Draw) -> list[int]:
    """`count` places of `law` [n] as `drawing` says; fewer where it has less mass."""
    if drawing == "distinct":
        return distinct(law, draw, count=count)
    if drawing == "independent":
        return [draw.categorical(law) for _ in range(count)]
    return [int(i) for i in law.topk(min(count, len(law))).indices]


def checked_vocabulary(slug: str, own: int, run: Run) -> None:
    """Refuse a target with other tokens than the drafter's.

    Raises:
        ValueError: naming both sizes.
    """
    theirs = vocabulary_of(run.model)
    if theirs != own:
        raise ValueError(
            f"{slug} drafts from a vocabulary of {own} tokens and the model has {theirs}: drafts are token ids, and "
            "both need the same tokenizer. Use a draft model of the same family; or prompt-lookup, token-recycling or "
            "stand, which need none"
        )


def vocabulary_of(model: object) -> int:
    """The number of tokens V that a model scores."""
    own = getattr(model, "vocab", None)
    if own is not None:
        return int(own)
    config = model.config  # type: ignore[attr-defined]  # any Hugging Face model
    return int(config.get_text_config(decoder=True).vocab_size)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, count] of the largest of `scores` [N, V], in order: `topk`, quicker on wide rows."""
    count = min(count, scores.shape[1])
    return largest_scores(scores, count) or scores.topk(count)


def likeliest(scores: Tensor) -> Tensor:
    """The index [N] of the largest of `scores` [N, V], the lowest among equals: `argmax`, quicker on wide rows."""
    found = largest_scores(scores, 1)
    return scores.argmax(-1) if found is None else found[1][:, 0]


__all__ = [
    "EMPTY", "NOTHING", "Ask", "Drafter", "Drawing", "Round",
    "checked_vocabulary", "drawn", "filled", "largest", "likeliest", "vocabulary_of",
]  # fmt: skip
