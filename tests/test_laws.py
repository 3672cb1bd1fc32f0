"""Every registered part against every law of its stage; the number of pairs is pinned."""

from __future__ import annotations

import pytest

from tokenloom.catalog import Part
from tokenloom.laws import Law
from tokenloom.testing import pairs

PAIRS = list(pairs())


@pytest.mark.parametrize(("part", "law"), PAIRS, ids=[f"{p.name}-{law.name}" for p, law in PAIRS])
def test_law(part: Part, law: Law) -> None:
    law.check(part)


def test_number_of_pairs_is_pinned() -> None:
    # A part or law added (or lost) shows here; update the number knowingly.
    assert len(PAIRS) == 1295
