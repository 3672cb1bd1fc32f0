"""STAND: drafts from n-grams that remember the target's laws, drawn without replacement (arXiv 2506.04708).

For every n-gram of the model's own output (n = 1 ... 4) the table keeps the target's law of the token behind it: the
most probable `kept` tokens and their probabilities, normalized; seen again, the running mean over the union of
tokens, cut to `kept` and normalized. The longest suffix of the text that is in the table gives the law q of the
drafts; the children of a node are drawn from it without replacement (Gumbel order, see recursive-rejection/draw) and
verified by recursive rejection. Trajectories of one problem share a table.

Deviations: which n, how laws are averaged and cut, and the growth of the tree are our reading; no code is known.
Fidelity: paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.catalog import part

PAPER = "arXiv:2506.04708"
Followers = tuple[tuple[int, ...], tuple[float, ...]]
"""Token ids, most probable first, and their probabilities, which sum to 1."""


class NGramTable:
    """Followers by n-gram; n from 1 to `longest`, `kept` followers each.

    Raises:
        ValueError: for fewer than one.
    """

    def __init__(self, *, longest: int = 4, kept: int = 10) -> None:
        if longest < 1 or kept < 1:
            raise ValueError(f"longest and kept are at least 1; got {longest} and {kept}")
        self.longest, self.kept = longest, kept
        self._seen: dict[tuple[int, ...], tuple[int, Followers]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, context: Sequence[int], followers: Followers) -> None:
        """The target's law behind the tokens `context`, of which the last `longest` count."""
        new = normalized(*followers, kept=self.kept)
        for n in range(1, min(self.longest, len(context)) + 1):
            gram = tuple(context[-n:])
            times, held = self._seen.get(gram, (0, new))
            self._seen[gram] = (times + 1, averaged(held, new, times, kept=self.kept) if times else new)

    def find(self, context: Sequence[int]) -> tuple[int, Followers | None]:
        """The length of the longest known suffix of `context`, 0 for none, and what follows it."""
        for n in range(min(self.longest, len(context)), 0, -1):
            found = self._seen.get(tuple(context[-n:]))
            if found is not None:
                return n, found[1]
        return 0, None


@part("stand", stage="draft", scope="row", paper=PAPER)
def stand(table: NGramTable, context: Sequence[int]) -> tuple[int, Followers | None]:
    """The law of drafts behind `context` and the length of the n-gram it belongs to; (0, None) when none is known."""
    return table.find(context)


@part("stand/average", stage="draft", scope="row", paper=PAPER)
def averaged(held: Followers, new: Followers, times: int, *, kept: int = 10) -> Followers:
    """The mean of a law held as the mean of `times` laws and one `new`, its `kept` most probable tokens, normalized."""
    total = {token: p * times for token, p in zip(*held, strict=True)}
    for token, p in zip(*new, strict=True):
        total[token] = total.get(token, 0.0) + p
    return normalized(tuple(total), tuple(total.values()), kept=kept)


def normalized(tokens: Sequence[int], masses: Sequence[float], *, kept: int) -> Followers:
    """The `kept` tokens of largest mass, lower ids first among equals, with masses that sum to 1."""
    best = sorted(((-mass, token) for token, mass in zip(tokens, masses, strict=True) if mass > 0))[:kept]
    total = -sum(mass for mass, _ in best)
    return tuple(token for _, token in best), tuple(-mass / total for mass, _ in best)
