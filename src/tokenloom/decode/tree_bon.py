"""TreeBoN as a loop: a tree of segments, pruned by the implicit reward of an aligned model of the same tokenizer.

    model.generate(**inputs, do_sample=True, max_new_tokens=192,
                   custom_generate=decode.loop("tree-bon", aligned=tuned, reward=score, tokenizer=tokenizer))

The decoded model is the reference. Finished candidates compete with their reward for the places of parents and are
kept unchanged. Without `reward` the implicit reward also chooses the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.auxiliary import aligned
from tokenloom.decode.registry import decoder
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Choice, Hypothesis, SearchLoop, draws, segment_search
from tokenloom.decode.session import Session, open_session
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.best_of_n import best_of_n
from tokenloom.methods.decoding.tree_bon import implicit_reward, parents

# Tokens whose laws over the vocabulary are held at once.
_CHUNK = 32


@decoder("tree-bon", kind="loop")
class TreeBoN(SearchLoop):
    """Best-of-N grown in `layers`: the best `n / children` prefixes by implicit reward branch into `children` each."""

    def __init__(
        self, aligned: Any, reward: Any = None, tokenizer: Any = None, *, n: int = 16, children: int = 4,
        layers: int = 4,
    ) -> None:  # fmt: skip
        """Raises ValueError for impossible numbers or an unusable reward."""
        parents([], n=n, children=children)
        if layers < 1:
            raise ValueError(f"tree-bon: layers = {layers}; a response has at least one")
        self._aligned, self.n, self.children, self.layers = aligned, n, children, layers
        self._reward = None if reward is None else reward_of("tree-bon", reward, tokenizer)

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""
        segment = -(-run.limit // self.layers)
        with open_session(self._aligned, run.prompts) as session:
            preference = _Aligned(run, session)

            def propose(live: list[Hypothesis]) -> list[list[Choice]]:
                return draws(run, live, [self.children if h.tokens else self.n for h in live])

            def score(candidates: list[Hypothesis]) -> list[float]:
                logprobs = preference.read(candidates)
                return [
                    float(implicit_reward(found, torch.tensor(h.notes, dtype=found.dtype)))
                    for h, found in zip(candidates, logprobs, strict=True)
                ]

            def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
                if all(h.done for h in candidates):
                    return candidates
                chosen = parents([h.score for h in candidates], n=self.n, children=self.children)
                return [candidates[i] for i in chosen]

            return segment_search(
                run,
                propose=propose,
                boundary=lambda h: len(h.tokens) - h.begin >= segment,
                score=score,
                select=select,
                width=self.n,
            )

    def answer(self, run: Run, pool: list[Hypothesis]) -> Hypothesis:
        """The leaf of the largest reward."""
        scores = [h.score for h in pool] if self._reward is None else self._reward(run, pool)
        return pool[best_of_n(scores)]


class _Aligned:
    """Log-probs of the aligned model for candidates, its cache following their parents."""

    def __init__(self, run: Run, session: Session) -> None:
        self._run, self._session = run, session
        self._rows = [(row, tuple[int, ...]()) for row in range(len(run))]
        self._next = dict(zip(self._rows, session.start(), strict=True))
        self._known: dict[tuple[int, tuple[int, ...]], Tensor] = {key: torch.zeros(0) for key in self._rows}

    def read(self, candidates: list[Hypothesis]) -> list[Tensor]:
        """[T] of each candidate's tokens, on the CPU; all candidates have just grown by a segment."""
        begins = [(h.row, h.tokens[: h.begin]) for h in candidates]
        self._session.branch([self._rows.index(key) for key in begins])
        segments = [h.tokens[h.begin :] for h in candidates]
        decoded = candidates[0].parent
        assert decoded is not None
        assert decoded.scores is not None
        vocab = decoded.scores.shape[-1]
        following = [aligned(wide(self._next[key]), vocab).log_softmax(-1) for key in begins]
        found = [[self._known[key]] for key in begins]
        for at in range(0, max(len(s) for s in segments), _CHUNK):
            pieces = [s[at : at + _CHUNK] for s in segments]
            longest = max(len(p) for p in pieces)
            # A chain per row, filled up behind shorter ones.
            tokens = torch.tensor([[*p, *([0] * (longest - len(p)))] for p in pieces])
            tried = self._session.try_nodes(tokens, torch.arange(-1, longest - 1).expand(len(pieces), longest))
            self._session.accept([range(len(p)) for p in pieces])
            for i, piece in enumerate(pieces):
                if piece:
                    laws = aligned(wide(tried[i, : len(piece)]), vocab).log_softmax(-1)
                    before = torch.cat((following[i][None], laws[:-1]))
                    found[i].append(before[torch.arange(len(piece)), torch.tensor(piece)].cpu())
                    following[i] = laws[-1]
        self._rows = [h.key for h in candidates]
        self._next = dict(zip(self._rows, following, strict=True))
        self._known = {
            key: torch.cat([p for p in parts if len(p)]) for key, parts in zip(self._rows, found, strict=True)
        }
        return [self._known[key] for key in self._rows]
