"""AriEL: a sentence is a box in [0, 1]^d, its volume the sentence's probability (Celotti, Brodeur and Rouat 2020).

Encode: token t cuts axis t mod d: of the current interval keep the part of the cumulative next-token law (in order of
ids) that belongs to the token. The code is the box's center. Decode z: token = the part that z_i lies in, then
z_i <- (z_i - low) / width, until the end token. A uniform z gives a sentence from the model.
Deviations: fractions instead of floats, so that texts of any length come back; intervals are closed on the left.
Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from tokenloom.catalog import part

_PAPER = "Celotti et al. 2020, AriEL: volume coding for sentence generation"
Box = list[tuple[Fraction, Fraction]]
"""(low, width) of each axis."""


@part("ariel/interval", stage="bytes", scope="row", paper=_PAPER)
def interval(probs: Tensor, token: int) -> tuple[Fraction, Fraction]:
    """(low, width) of a token's part of [0, 1] under the law `probs` [V].

    Raises:
        ValueError: for a token of probability 0, which has no part, or none of the vocabulary.
    """
    if not 0 <= token < len(probs):
        raise ValueError(f"ariel: token {token} is none of the model's {len(probs)}; codes need its own tokenizer")
    edges = _edges(probs)
    low, high = Fraction(float(edges[token])), Fraction(float(edges[token + 1]))
    if high <= low:
        raise ValueError(f"ariel: token {token} has probability 0 under the model, so its text has no code")
    return low, high - low


@part("ariel/narrow", stage="bytes", scope="row", paper=_PAPER)
def narrowed(box: Box, step: int, part_of: tuple[Fraction, Fraction]) -> Box:
    """`box` after token number `step`, whose part of its axis is `part_of`."""
    axis = step % len(box)
    low, width = box[axis]
    share, size = part_of
    return [*box[:axis], (low + width * share, width * size), *box[axis + 1 :]]


@part("ariel", stage="bytes", scope="row", paper=_PAPER)
def decoded_token(probs: Tensor, code: Fraction) -> tuple[int, Fraction]:
    """The token that `code` in [0, 1) lies in under the law `probs` [V], and the code within its part.

    Raises:
        ValueError: for a code outside [0, 1).
    """
    if not 0 <= code < 1:
        raise ValueError(f"ariel: codes lie in [0, 1), got {float(code)}")
    edges = _edges(probs)
    near = float(code)
    token = int(torch.searchsorted(edges, torch.tensor(near, dtype=torch.float64), right=True)) - 1
    token = min(max(token, 0), len(probs) - 1)
    # The float may have been rounded over an edge.
    while Fraction(float(edges[token])) > code:
        token -= 1
    while Fraction(float(edges[token + 1])) <= code:
        token += 1
    low, width = interval(probs, token)
    return token, (code - low) / width


def center(box: Box) -> tuple[Fraction, ...]:
    """The code of a box."""
    return tuple(low + width / 2 for low, width in box)


def volume(box: Box) -> Fraction:
    """The probability of its sentence."""
    total = Fraction(1)
    for _, width in box:
        total *= width
    return total


def whole_box(axes: int) -> Box:
    """[0, 1]^axes.

    Raises:
        ValueError: without an axis.
    """
    if axes < 1:
        raise ValueError(f"ariel: a code needs at least one axis, got {axes}")
    return [(Fraction(0), Fraction(1))] * axes


def fractions(code: Sequence[float | Fraction]) -> list[Fraction]:
    """A code's numbers, exactly.

    Raises:
        ValueError: for what is no finite number.
    """
    try:
        return [Fraction(z) for z in code]
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"ariel: a code is made of finite numbers: {error}") from None


def _edges(probs: Tensor) -> Tensor:
    """[V + 1], from exactly 0 to exactly 1 and never falling; equal where a token has no mass."""
    cumulative = probs.detach().double().cpu().cumsum(0)
    edges = torch.cat((torch.zeros(1, dtype=torch.float64), cumulative / cumulative[-1]))
    last = int(probs.nonzero()[-1])
    edges[last + 1 :] = 1.0
    return edges
