"""SkipDecode's schedule: ends, nesting, cost, limits and refusals."""

from __future__ import annotations

import itertools

import pytest

from tokenloom.methods.decoding.skipdecode import active_layers, relative_cost


def test_worked_numbers() -> None:
    settings = {"least": 4, "most": 10, "over": 6}
    assert active_layers(-1, 12, **settings) == [0, *range(3, 12)]
    assert active_layers(0, 12, **settings) == [0, *range(3, 12)]
    assert active_layers(1, 12, **settings) == [0, *range(4, 12)]
    assert active_layers(6, 12, **settings) == [0, 9, 10, 11]
    assert active_layers(600, 12, **settings) == [0, 9, 10, 11]
    assert active_layers(6, 12, **settings, warmup=3) == [0, 1, 2, 11]
    assert active_layers(1, 12, least=8, most=9, over=2) == [0, *range(4, 12)]  # 8.5 layers are 9


@pytest.mark.parametrize("total", [2, 5, 24])
def test_layers_are_nested_and_end_at_the_least(total: int) -> None:
    for warmup in range(1, total - 1):
        sets = [set(active_layers(t, total, warmup=warmup, over=9)) for t in range(-1, 12)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(sets))
        assert sets[0] == set(range(total))
        assert len(sets[-1]) == max(total // 2, warmup + 1)
        assert all({*range(warmup), total - 1} <= s for s in sets)


def test_cost_is_the_share_of_layers() -> None:
    assert relative_cost(100, 12, least=12) == 1.0
    assert relative_cost(4, 10, least=2, most=10, over=4) == pytest.approx((10 + 8 + 6 + 4) / 40, abs=1e-12)
    assert relative_cost(0, 10) == 0.0


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 0}, {"warmup": 2, "least": 2}, {"least": 7, "most": 6}, {"most": 13}, {"over": 0}],
)
def test_impossible_schedules_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warmup < least <= most <= 12"):
        active_layers(0, 12, **settings)
