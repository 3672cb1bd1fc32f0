"""Token quantities in 8 bits: small enough that a page can hold a million tokens.

value = (code - zero) * step, one `zero` and one `step` for each row of each quantity; code 255: no value.
Zero is exact and so is the largest size of a row whose values have one sign; no sign is ever lost. Any other value is
off by at most half a step, a small one that must keep its sign by less than a whole one. A step is 1/254 of the row's
range (zero included), slightly more when one of its ends is very near to zero.
"""

from __future__ import annotations

import base64
import math
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence

NONE = 255
_TOP = 254


def quantize(values: Sequence[float]) -> tuple[bytes, int, float]:
    """Codes, zero and step of one row; NaN and infinities have no value."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return bytes(0 if math.isfinite(v) else NONE for v in values), 0, 1.0
    # Both ends get a whole number of steps on their side, and a side that holds anything gets one at least.
    zero = round(-low / (high - low) * _TOP)
    zero = min(max(zero, int(low < 0)), _TOP - int(high > 0))
    step = max(-low / zero if zero else 0.0, high / (_TOP - zero) if zero < _TOP else 0.0)
    codes = bytearray()
    for value in values:
        if not math.isfinite(value):
            codes.append(NONE)
            continue
        code = round(value / step)
        if code == 0 and value:
            code = 1 if value > 0 else -1
        codes.append(zero + code)
    return bytes(codes), zero, step


def quantity_blob(rows: Iterable[Sequence[float]]) -> str:
    """All rows of one quantity: steps (float32), zeros (a byte each), then the codes, row after row."""
    found = [quantize(row) for row in rows]
    steps = array("f", (step for _, _, step in found))
    return packed(_little(steps), bytes(zero for _, zero, _ in found), *(codes for codes, _, _ in found))


def index_blob(indices: Iterable[int]) -> str:
    """Whole numbers as uint32."""
    return packed(_little(array("I", indices)))


def packed(*parts: bytes) -> str:
    """Deflated (zlib), then base64."""
    return base64.b64encode(zlib.compress(b"".join(parts), 6)).decode("ascii")


def _little(values: array[float] | array[int]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
