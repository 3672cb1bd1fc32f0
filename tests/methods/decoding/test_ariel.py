"""AriEL: volumes are probabilities, and every point of a box decodes to its sentence."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.ariel import (
    center,
    decoded_token,
    fractions,
    interval,
    narrowed,
    volume,
    whole_box,
)

CHAIN = {0: [0.5, 0.3, 0.2], 1: [0.5, 0.5, 0.0], 2: [0.3, 0.3, 0.4]}


def law(prefix: tuple[int, ...]) -> Tensor:
    return torch.tensor(CHAIN[len(prefix) % 3], dtype=torch.float64)


def encode(tokens: tuple[int, ...], axes: int) -> list[tuple[Fraction, Fraction]]:
    box = whole_box(axes)
    for step, token in enumerate(tokens):
        box = narrowed(box, step, interval(law(tokens[:step]), token))
    return box


def decode(code: list[Fraction], length: int) -> tuple[int, ...]:
    code, tokens = list(code), ()
    for step in range(length):
        axis = step % len(code)
        token, code[axis] = decoded_token(law(tokens), code[axis])
        tokens = (*tokens, token)
    return tokens


@pytest.mark.parametrize("axes", [1, 2, 3, 16])
def test_boxes_tile_the_cube_with_the_law(axes: int) -> None:
    total = Fraction(0)
    for tokens in itertools.product(range(3), range(2), range(3), range(3)):
        box = encode(tokens, axes)
        probability = 1.0
        for step, token in enumerate(tokens):
            probability *= float(law(tokens[:step])[token])
        assert float(volume(box)) == pytest.approx(probability, abs=1e-15)
        total += volume(box)
        low = [z for z, _ in box]
        almost = [z + width * Fraction(10**9 - 1, 10**9) for z, width in box]
        for point in (list(center(box)), low, almost):
            assert decode(point, 4) == tokens
    assert total == pytest.approx(1)


def test_the_worked_example() -> None:
    """Chain of .5, .5, .3, .3 on two axes: volume .0225, center (.425, .275)."""
    laws = [[0.5, 0.5], [0.5, 0.5], [0.7, 0.3], [0.4, 0.3, 0.3]]
    box = whole_box(2)
    for step, (probs, token) in enumerate(zip(laws, [0, 0, 1, 1], strict=True)):
        box = narrowed(box, step, interval(torch.tensor(probs, dtype=torch.float64), token))
    assert float(volume(box)) == pytest.approx(0.0225, abs=1e-12)
    assert [float(z) for z in center(box)] == pytest.approx([0.425, 0.275], abs=1e-12)


def test_long_texts_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens: tuple[int, ...] = ()
    for _ in range(300):
        tokens = (*tokens, int(torch.multinomial(law(tokens), 1, generator=generator)))
    for axes in (1, 5):
        box = encode(tokens, axes)
        assert decode(list(center(box)), 300) == tokens
    assert float(volume(encode(tokens, 1))) < 1e-90


def test_edges() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    for code, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert decoded_token(probs, Fraction(code))[0] == token
    just_below_one = Fraction(2**200 - 1, 2**200)
    assert decoded_token(probs, just_below_one)[0] == 3
    with pytest.raises(ValueError, match="probability 0"):
        interval(probs, 2)
    for outside in (-1, len(probs)):
        with pytest.raises(ValueError, match="none of the model's"):
            interval(probs, outside)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite numbers"):
            fractions([0.5, wrong])
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        decoded_token(probs, Fraction(1))
    with pytest.raises(ValueError, match="at least one axis"):
        whole_box(0)
    assert fractions([0.5, Fraction(1, 3)]) == [Fraction(1, 2), Fraction(1, 3)]
