"""Watermark detectors by name: from a text's ids to a p-value, `decode.build("detector", name, {"vocabulary": V})`.

The p-value is the chance that text written without the key looks at least as watermarked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from tokenloom.decode import distortion_free_watermark as free
from tokenloom.decode.registry import decoder
from tokenloom.methods.decoding import green_list_watermark as green


class Found(NamedTuple):
    """The evidence in a text: the method's statistic and its p-value."""

    statistic: float
    p_value: float


Detector = Callable[[Sequence[int]], Found]


@decoder("green-list-watermark", kind="detector")
def green_list(vocabulary: int, *, gamma: float = 0.25, key: int = 15485863, context: int = 1) -> Detector:
    """Counts green tokens: z-score of their number, and the exact tail of the binomial law."""

    def detect(ids: Sequence[int]) -> Found:
        found = green.detect(ids, vocabulary, gamma=gamma, key=key, context=context)
        return Found(found.z, found.p_value)

    return detect


@decoder("distortion-free-watermark", kind="detector")
def distortion_free(
    vocabulary: int,
    *,
    key: int = 0,
    length: int = 256,
    kind: Literal["exp", "its"] = "exp",
    edit: bool = True,
    resamples: int = 99,
) -> Detector:
    """Aligns the text with the key's numbers, and compares with `resamples` random keys."""
    secret = free.WatermarkKey(key, vocabulary, length=length, kind=kind)

    def detect(ids: Sequence[int]) -> Found:
        found = free.detect(ids, secret, edit=edit, resamples=resamples)
        return Found(found.statistic, found.p_value)

    return detect
