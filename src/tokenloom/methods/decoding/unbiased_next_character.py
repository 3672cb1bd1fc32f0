"""Unbiased next character under greedy longest-match encoding: Branch-and-Pass (arXiv 2406.16829).

Text that ends in a token says, by the encoding, what does not follow it; so P(next | token) is not P(next | text).
    bp(t, r) = Σ_{v starts with r} P(v | t)  +  [g shorter than r] P(g | t) bp(t g, r without g)
with g the longest token that r starts with is the probability that text goes on with r after the tokens t, and
    P(a | text) = bp(t, text a) / bp(t, text).
It takes at most as many laws as r has tokens. Deviations: none. BPE does not encode by the longest match; there the
covers of `byte-level-probabilities` give the same quantity. Fidelity: paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tokenloom.catalog import part

_PAPER = "arXiv:2406.16829"


@part("unbiased-next-character/branch-and-pass", stage="bytes", scope="row", paper=_PAPER)
def branch_and_pass(law: Callable[[tuple[int, ...]], Tensor], pieces: Sequence[bytes | None], text: bytes) -> float:
    """The probability that text starts with `text`, for a model `law(tokens) -> [V]` of longest-match encodings.

    `pieces[id]`: the bytes of each token, None for control tokens.
    """
    passed, rest = 1.0, text
    tokens: tuple[int, ...] = ()
    known = {piece: i for i, piece in enumerate(pieces) if piece}
    total = 0.0
    while True:
        probs = law(tokens).double()
        branches = [i for i, piece in enumerate(pieces) if piece and piece.startswith(rest)]
        total += passed * float(probs[branches].sum())
        greedy = next((rest[:n] for n in range(len(rest) - 1, 0, -1) if rest[:n] in known), None)
        # A token that is all of the rest is among the branches; then nothing is left to pass.
        if greedy is None or rest in known:
            return total
        passed *= float(probs[known[greedy]])
        if passed <= 0:
            return total
        tokens, rest = (*tokens, known[greedy]), rest[len(greedy) :]


@part("unbiased-next-character", stage="bytes", scope="row", paper=_PAPER)
def next_character(
    law: Callable[[tuple[int, ...]], Tensor], pieces: Sequence[bytes | None], text: bytes, character: bytes
) -> float:
    """P(character | text), for a model `law(tokens) -> [V]` of longest-match encodings.

    Raises:
        ValueError: when `text` itself has no probability.
    """
    before = branch_and_pass(law, pieces, text)
    if before <= 0:
        raise ValueError(f"unbiased-next-character: the model gives {text!r} no probability")
    return branch_and_pass(law, pieces, text + character) / before
