"""Parts that a test registers vanish with it, so that no other test (nor the pinned count of laws) sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tokenloom import catalog, signals


@pytest.fixture(autouse=True)
def catalog_restored() -> Iterator[None]:
    tables: tuple[dict[str, Any], ...] = (catalog.parts(), catalog.presets(), signals.CHUNK_SIGNALS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
