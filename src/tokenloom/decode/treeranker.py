"""TreeRanker on a model: one greedy walk through the trie of completions, one forward per node that branches.

ranker = TreeRanker(model, tokenizer)
order = ranker.rank("def area(r): return math.", ["pi", "pow(", "prod("])     # indices, best first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenloom.decode.candidates import encoded
from tokenloom.decode.session import open_session
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.treeranker import END, Tokens, child_scores, children_of, ranking


class TreeRanker:
    """Ranks completions of a context. `delimiters` are texts whose first tokens say that a completion ended."""

    def __init__(self, model: Any, tokenizer: Any, *, delimiters: Sequence[str] = ()) -> None:
        """Raises ValueError for a delimiter without tokens."""
        self._model, self._tokenizer = model, tokenizer
        spelled = [encoded_alone(tokenizer, text) for text in delimiters]
        if not all(spelled):
            raise ValueError(f"treeranker: a delimiter is a text of at least one token, got {list(delimiters)}")
        self._delimiters = sorted({ids[0] for ids in spelled})
        self.calls = 0
        """Forwards of the last ranking."""

    def rank(self, context: str, completions: Sequence[str]) -> list[int]:
        """Indices of `completions`, best first.

        Each completion is tokenized behind the context; where that changes the context's own last tokens, the walk
        starts before them, so that no completion is judged by a split that the model never saw.

        Raises:
            ValueError: without completions, or when nothing of the context stays in front of all of them.
        """
        if not completions:
            raise ValueError("treeranker needs at least one completion")
        own = encoded(self._tokenizer, context)
        whole = [encoded(self._tokenizer, context + text) for text in completions]
        kept = min(_shared(own, ids) for ids in whole)
        if kept == 0:
            raise ValueError("treeranker needs a context of at least one token that all completions keep; add a line")
        return self.rank_ids(own[:kept], [tuple(ids[kept:]) for ids in whole])

    def rank_ids(self, context: Sequence[int], completions: Sequence[Tokens]) -> list[int]:
        """The same for ids: `completions` follow `context`."""
        self.calls = 0
        walk = _to_branch(completions, ())
        visited: dict[Tokens, dict[int, float]] = {}
        with open_session(self._model, [[*context, *walk]]) as session:
            read = len(walk)
            while (children := children_of(completions, walk)) != [END]:
                scores = session.start() if self.calls == 0 else session.extend([walk[read:]])
                self.calls, read = self.calls + 1, len(walk)
                found = child_scores(wide(scores[0]).log_softmax(-1), children, self._delimiters)
                visited[walk] = dict(zip(children, found.tolist(), strict=True))
                best = children[int(found.argmax())]
                if best == END:
                    break
                walk = _to_branch(completions, (*walk, best))
        return ranking(completions, (*walk, END), visited)


def encoded_alone(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without special tokens."""
    return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]


def _to_branch(completions: Sequence[Tokens], walk: Tokens) -> Tokens:
    """`walk` with what follows without a choice, up to a node that branches or an end."""
    while len(children := children_of(completions, walk)) == 1 and children != [END]:
        walk = (*walk, children[0])
    return walk


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)
