"""One tiny model for the tests of a process; the parts that a test registers vanish with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tokenloom import catalog, signals
from train.setups import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def catalog_restored() -> Iterator[None]:
    tables: tuple[dict[str, Any], ...] = (catalog.parts(), catalog.presets(), signals.CHUNK_SIGNALS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
