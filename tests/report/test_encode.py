"""Quantities in 8 bits: within the error that is promised, signs and zeros kept, inflated to what went in."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib

import pytest

from tokenloom.report.encode import NONE, index_blob, quantity_blob, quantize


def _back(codes: bytes, zero: int, step: float) -> list[float]:
    return [math.nan if c == NONE else (c - zero) * step for c in codes]


@pytest.mark.parametrize("ends", [(-1, 1), (0, 1), (-3, 0), (-1e-6, 5), (-5, 1e-9), (2, 3)])
def test_error_sign_and_zero(ends: tuple[float, float]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        row = [rng.choice([0.0, math.nan, rng.uniform(*ends), rng.uniform(*ends)]) for _ in range(rng.randint(0, 20))]
        codes, zero, step = quantize(row)
        finite = [v for v in row if not math.isnan(v)]
        spread = max([0.0, *finite]) - min([0.0, *finite])
        # Rounding `zero` moves an end by half a step of 254 at most; a side that was rounded away gets a whole one.
        assert step <= 1.05 * spread / 254 or spread == 0
        for value, found in zip(row, _back(codes, zero, step), strict=True):
            assert math.isnan(value) == math.isnan(found)
            if not math.isnan(value):
                assert (value > 0) - (value < 0) == (found > 0) - (found < 0)
                rescued = abs(found) == step and abs(value) < step / 2
                assert rescued or abs(value - found) <= step / 2 * (1 + 1e-9)


@pytest.mark.parametrize("row", [[0.7, 0.7, 0.0], [-0.3] * 4, [0.0, 0.0], [math.nan, math.inf], []])
def test_constant_rows_are_exact(row: list[float]) -> None:
    found = _back(*quantize(row))
    expected = [v if math.isfinite(v) else math.nan for v in row]
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_layout_of_a_blob() -> None:
    raw = zlib.decompress(base64.b64decode(quantity_blob([[0.5, 0.0], [-2.0]])))
    assert struct.unpack("<2f", raw[:8]) == pytest.approx((0.5 / 254, 2 / 254))
    assert list(raw[8:10]) == [0, 254]
    assert list(raw[10:]) == [254, 0, 0]
    assert struct.unpack("<3I", zlib.decompress(base64.b64decode(index_blob([1, 0, 70_000])))) == (1, 0, 70_000)
