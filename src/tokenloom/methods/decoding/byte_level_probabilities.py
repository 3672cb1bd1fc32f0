"""Exact byte-level probabilities: the law of the next byte under a model of tokens (arXiv 2410.09303).

cover(x): the token sequences whose bytes start with x, but not without their last token. They exclude each other, and
    P(x) = Σ_{t ∈ cover(x)} P(t)
    P(next = a | x) = P(xa) / P(x),   P(end | x) = Σ_{t: bytes are x} P(t) P(end | t) / P(x)
hold for any model of tokens. Tokens sorted by their bytes stand side by side when they share a beginning, so that the
part of a cover that ends inside a token after t is a range of the sorted tokens with the law after t: a `Branch`.

"all": every tokenization counts; exact for the model as it is, but the number of branches grows with the text, so that
    those below `prune` times the largest are dropped. "canonical": only those that the tokenizer itself writes; linear,
    and the law is conditioned on canonical text (in a consistent model the others have probability 0).
Control tokens carry no bytes; the law over bytes and the end is normalized without them.
Deviations: in canonical mode tokens that begin inside a character are taken as valid until it is complete.
Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenloom.catalog import part

END = 256
"""Index of the end in a law over bytes and the end, [257]."""
_PAPER = "arXiv:2410.09303"


class SortedTokens:
    """Tokens in the order of their bytes; `pieces[id]` are the bytes, None for control tokens."""

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        """Sort the tokens that have bytes.

        Raises:
            ValueError: when no token has bytes.
        """
        ranked = sorted((piece, i) for i, piece in enumerate(pieces) if piece)
        if not ranked:
            raise ValueError("byte-level-probabilities: no token has bytes")
        self.pieces = [piece for piece, _ in ranked]
        self.ids = torch.tensor([i for _, i in ranked])
        longest = max(map(len, self.pieces))
        # Column d holds the byte at depth d, -1 behind the end: in byte order, a shorter token comes first.
        table = torch.full((len(ranked), longest), -1, dtype=torch.int16)
        for row, piece in enumerate(self.pieces):
            table[row, : len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8).to(torch.int16)
        self.columns = table.T.contiguous()


@dataclass
class Branch:
    """Continuations of the tokens `ids` whose next token has bytes `depth` deep in the text: places low:high.

    `cumulative` [n + 1] sums the law after `ids` over the sorted tokens, times the probability of `ids`.
    """

    ids: tuple[int, ...]
    cumulative: Tensor
    low: int
    high: int
    depth: int = 0

    @property
    def mass(self) -> float:
        """Probability of `ids` and any of the tokens."""
        return float(self.cumulative[self.high] - self.cumulative[self.low])


@dataclass
class Cover:
    """The cover of a text: branches of tokens under way, and sequences whose bytes are just the text."""

    tokens: SortedTokens
    branches: list[Branch] = field(default_factory=list)
    fresh: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    """Sequences that ended with the last byte, and their probabilities: their laws are still to be had."""
    end: float = 0.0
    """Probability that the text is this and nothing more."""

    def add(self, ids: tuple[int, ...], probability: float, law: Tensor, eos: Sequence[int] = ()) -> None:
        """Continue a sequence that ends here, with the law [V] of its next token (control tokens may be 0)."""
        law = law.detach().double().cpu()
        ordered = law[self.tokens.ids] * probability
        cumulative = torch.cat((torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)))
        self.branches.append(Branch(ids, cumulative, 0, len(ordered)))
        self.end += probability * sum(float(law[e]) for e in eos)

    def advance(self, byte: int, valid: Callable[[tuple[int, ...]], bool] | None = None, prune: float = 0.0) -> None:
        """Make the text one byte longer; `fresh` then holds the sequences that end with it.

        `valid(ids)`: whether a sequence counts (canonical mode). Branches below `prune` times the largest are dropped.
        """
        self.fresh, self.end = [], 0.0
        kept: list[Branch] = []
        for branch in self.branches:
            column = self.tokens.columns[branch.depth] if branch.depth < len(self.tokens.columns) else None
            if column is None:
                continue
            edges = torch.tensor([byte, byte + 1], dtype=column.dtype)
            low, high = (torch.searchsorted(column[branch.low : branch.high].contiguous(), edges) + branch.low).tolist()
            depth = branch.depth + 1
            while low < high and len(self.tokens.pieces[low]) == depth:
                mass = float(branch.cumulative[low + 1] - branch.cumulative[low])
                ids = (*branch.ids, int(self.tokens.ids[low]))
                if mass > 0 and (valid is None or valid(ids)):
                    self.fresh.append((ids, mass))
                low += 1
            narrowed = Branch(branch.ids, branch.cumulative, low, high, depth)
            if low < high and narrowed.mass > 0:
                kept.append(narrowed)
        least = prune * max([b.mass for b in kept] + [m for _, m in self.fresh], default=0.0)
        self.branches = [b for b in kept if b.mass >= least]
        self.fresh = [(ids, mass) for ids, mass in self.fresh if mass >= least]

    @property
    def mass(self) -> float:
        """P(x), control tokens left out: what goes on with a byte, or ends. Only once `fresh` was continued."""
        return self.end + sum(b.mass for b in self.branches)

    def masses(self) -> Tensor:
        """[257]: P(xa) of every next byte a, and P(x, end)."""
        total = torch.zeros(END + 1, dtype=torch.float64)
        for branch in self.branches:
            if branch.depth >= len(self.tokens.columns):
                continue
            column = self.tokens.columns[branch.depth][branch.low : branch.high].contiguous()
            edges = torch.searchsorted(column, torch.arange(END + 1, dtype=column.dtype)) + branch.low
            total[:END] += branch.cumulative[edges].diff()
        total[END] = self.end
        return total


@part("byte-level-probabilities", stage="bytes", scope="row", paper=_PAPER)
def next_byte_law(masses: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """[257]: the law of the next byte (or the end) from masses [257], P(xa) for every a.

    temperature: p^(1/temperature), renormalized; below 0.1 the most probable byte is certain. top_p: a byte stays while
    the mass of those before it, by falling probability, is at most `top_p`.

    Raises:
        ValueError: when there is no mass, as after a text that the model cannot write.
    """
    total = masses.double().sum()
    if not bool(total > 0):
        raise ValueError("byte-level-probabilities: the model gives the text no probability")
    law = masses.double() / total
    if temperature < 0.1:
        return torch.zeros_like(law).scatter_(0, law.argmax(keepdim=True), 1.0)
    if temperature != 1:
        # Relative to the largest, so that small powers do not vanish together.
        law = (law / law.max()) ** (1 / temperature)
        law = law / law.sum()
    if top_p < 1:
        ranked, order = law.sort(descending=True, stable=True)
        drop = ranked.cumsum(0) - ranked > top_p
        law = law.index_fill(0, order[drop], 0.0)
        law = law / law.sum()
    return law


@part("byte-level-probabilities/mean", stage="bytes", scope="row", paper=_PAPER)
def mean_law(laws: Tensor) -> Tensor:
    """[257]: the arithmetic mean of several models' byte laws [M, 257], whatever their tokens; renormalized."""
    mean = laws.double().mean(0)
    return mean / mean.sum()
