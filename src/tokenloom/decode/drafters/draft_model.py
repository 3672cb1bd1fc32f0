"""A smaller model of the same tokenizer as a drafter: its own session, drafts level by level for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import Ask, Drafter, checked_vocabulary, drawn, filled, largest, vocabulary_of
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.decode.session import ROOT, Session, open_session
from tokenloom.methods.decoding.draft_tree import DraftTree


@decoder("draft-model", kind="drafter")
class DraftModel(Drafter):
    """Drafts of a second causal LM `draft` with the same tokenizer, `width` children a node, `depth` deep.

    Its scores go through the processors of the run, so that temperature and truncation are those of the target.
    With both tokenizers given they are compared; without, the sizes of the vocabularies are.
    """

    slug = "draft-model"
    draws = True
    misses = True  # it reads what it has missed when it drafts again
    guess = (0.6, 0.15, 0.08, 0.05)

    def __init__(
        self, draft: Any, tokenizer: Any = None, draft_tokenizer: Any = None, *, width: int = 4, depth: int = 4
    ) -> None:
        if width < 1 or depth < 1:
            raise ValueError(f"draft-model: width and depth are 1 or more; got {width} and {depth}")
        if None not in (tokenizer, draft_tokenizer) and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
            raise ValueError(
                "draft-model: the draft model's tokenizer has other tokens than the target's; use a draft model of the "
                "same family, or prompt-lookup, token-recycling or stand, which need none"
            )
        self._model = draft
        self.branching, self.depth = (width, width), depth
        self._session: Session | None = None

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        checked_vocabulary(self.slug, vocabulary_of(self._model), run)
        self._run = run
        with ExitStack() as self._stack:
            yield
        self._session = None

    def keep(self, places: Sequence[int]) -> None:
        """See `Drafter`."""
        if self._session is not None:
            self._session.branch(places)

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        session, scores = self._caught_up([ask.text for ask in asks])
        levels = max((max(a.shape.depths, default=0) for a in asks), default=0)
        chains = all(set(a.shape.ranks) <= {0} for a in asks)
        known: list[dict[tuple[int, ...], Tensor]] = [{(): s} for s in scores]
        drawings: list[dict[tuple[int, ...], tuple[list[int], Tensor | None]]] = [{} for _ in asks]
        trees = [self._tree(*given, 1) for given in zip(asks, known, drawings, strict=True)]
        lengths = [len(row) for row in session.rows]
        for level in range(1, levels):
            self._read_level(session, trees, known, chains)
            trees = [self._tree(*given, level + 1) for given in zip(asks, known, drawings, strict=True)]
        if chains and levels > 1:
            session.crop(lengths)
        return trees

    def _caught_up(self, texts: Sequence[list[int]]) -> tuple[Session, Tensor]:
        """The session with all of `texts` committed, and scores [B, V] behind them."""
        self._count()
        if self._session is None:
            self._session = self._stack.enter_context(open_session(self._model, texts))
            return self._session, self._session.start()
        new = [text[len(read) :] for text, read in zip(texts, self._session.rows, strict=True)]
        return self._session, self._session.extend(new)

    def _count(self) -> None:
        self._run.counts["draft_forwards"] = self._run.counts.get("draft_forwards", 0) + 1

    def _read_level(
        self,
        session: Session,
        trees: Sequence[DraftTree],
        known: Sequence[dict[tuple[int, ...], Tensor]],
        chains: bool,
    ) -> None:
        """Scores behind the deepest nodes of each tree."""
        self._count()
        if chains:
            # Rows with shorter chains read their last token again, to no effect.
            tokens = [tree.tokens[-1] if len(tree) else 0 for tree in trees]
            for row, (tree, scores) in enumerate(zip(trees, session.step(torch.tensor(tokens)), strict=True)):
                known[row].setdefault(tuple(tree.tokens), scores)
            return
        n = max(1, *(len(tree) for tree in trees))
        ids = [[*tree.tokens, *[0] * (n - len(tree))] for tree in trees]
        above = [[*tree.parents, *[ROOT] * (n - len(tree))] for tree in trees]
        tried = session.try_nodes(torch.tensor(ids), torch.tensor(above))
        for row, tree in enumerate(trees):
            paths: list[tuple[int, ...]] = []
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                paths.append((*(paths[parent] if parent != ROOT else ()), token))
                known[row].setdefault(paths[-1], tried[row, node])

    def _tree(
        self,
        ask: Ask,
        known: dict[tuple[int, ...], Tensor],
        drawings: dict[tuple[int, ...], tuple[list[int], Tensor | None]],
        depth: int,
    ) -> DraftTree:
        """The tree down to `depth`, for which scores are known; what was drawn before stays."""
        shape: Shape = ask.shape.cut(depth)
        generated = ask.text[len(self._run.prompts[ask.row]) :]
        visits: dict[tuple[int, ...], int] = {}

        def followers(path: list[int], count: int) -> tuple[list[int], Tensor | None]:
            # Equal paths may occur several times among independent draws, each with children of its own.
            at = (*path, -1, visits.setdefault(tuple(path), 0))
            visits[tuple(path)] += 1
            if at not in drawings:
                scores = known[tuple(path)][None]
                if ask.drawing == "given":
                    shaped = self._run.shaped([ask.row], [[*generated, *path]], scores)
                    drawings[at] = [int(i) for i in largest(shaped, count)[1][0]], None
                else:
                    law = self._run.laws([ask.row], [[*generated, *path]], scores)[0]
                    drawings[at] = drawn(law, count, ask.drawing, ask.draw), law
            return drawings[at]

        return filled(shape, followers)
