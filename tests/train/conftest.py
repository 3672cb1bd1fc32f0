"""One tiny model for the tests of a process."""

from __future__ import annotations

import pytest

from train.setups import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))
