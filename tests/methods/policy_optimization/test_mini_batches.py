"""How a batch becomes optimizer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import defaults
from tokenloom.methods.policy_optimization.mini_batches import mini_batches

IDS = torch.tensor([7, 2, 7, 2, 40, 7, 2, 3, 3, 40])
KEEP = torch.ones(10, dtype=torch.bool)


def deal(keep: Tensor = KEEP, seed: int = 0, **settings: int) -> list[list[int]]:
    return [rows.tolist() for rows in mini_batches(IDS, keep, torch.Generator().manual_seed(seed), **settings)]


def test_defaults_make_one_update_and_leave_the_generator_alone() -> None:
    assert defaults("mini-batches") == {"epochs": 1, "mini_batches": 1}
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    (rows,) = mini_batches(IDS, KEEP, generator)
    assert rows.tolist() == list(range(10))
    assert torch.equal(before, generator.get_state())


def test_groups_stay_whole_and_every_epoch_sees_every_row() -> None:
    updates = deal(epochs=3, mini_batches=2)
    assert len(updates) == 6
    for one, two in zip(updates[::2], updates[1::2], strict=True):
        assert sorted(one + two) == list(range(10))
        assert one == sorted(one)
        assert not {int(IDS[i]) for i in one} & {int(IDS[i]) for i in two}
    assert len({tuple(u) for u in updates}) > 2  # shuffled anew


def test_seeded() -> None:
    assert deal(mini_batches=4, seed=3) == deal(mini_batches=4, seed=3)
    assert any(deal(mini_batches=4, seed=s) != deal(mini_batches=4, seed=0) for s in range(1, 5))


def test_dropped_rows_are_dealt_to_nobody() -> None:
    keep = IDS != 40
    keep[0] = False
    assert sorted(i for rows in deal(keep, mini_batches=2) for i in rows) == [1, 2, 3, 5, 6, 7, 8]
    assert deal(torch.zeros(10, dtype=torch.bool)) == []


def test_never_more_updates_than_groups() -> None:
    updates = deal(mini_batches=9)
    assert len(updates) == 4
    assert all(updates)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"mini_batches": 0}])
def test_less_than_one_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        deal(**wrong)
