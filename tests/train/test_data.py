"""The order of prompts: without replacement, by seed, and continued from a position."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenloom.tasks import Item, Task
from tokenloom.train.data import PromptStream, derive


def task(*sizes: int) -> Task:
    stages = tuple(tuple(Item(None, f"{stage}-{i}", "", {}) for i in range(size)) for stage, size in enumerate(sizes))
    flat = [item for stage in stages for item in stage]
    return Task("made", flat, [], None, stages, "")


def names(items: list[Item]) -> list[str]:
    return [str(item.prompt) for item in items]


def test_an_epoch_holds_every_item_once() -> None:
    stream = PromptStream(task(7), 0)
    drawn = [name for _ in range(7) for name in names(stream.draw(3, 0.0))]
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(names(list(task(7).train)))
    assert epochs[0] != epochs[1] != epochs[2]


def test_more_than_everything_can_be_drawn_at_once() -> None:
    drawn = PromptStream(task(3), 0).draw(8, 0.0)
    assert sorted(Counter(names(drawn)).values()) == [2, 3, 3]


def test_the_seed_decides_the_order() -> None:
    first, again, other = (names(PromptStream(task(20), seed).draw(20, 0.0)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("sizes", [(7,), (2, 3, 4), (1, 1), (5, 1, 1, 9)])
@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_any_position_can_be_continued_from(sizes: tuple[int, ...], count: int) -> None:
    total = 12
    whole = PromptStream(task(*sizes), 3)
    positions, drawn = [], []
    for step in range(total):
        positions.append(whole.position)
        drawn.append(names(whole.draw(count, step / total)))
    for step in range(total):
        resumed = PromptStream(task(*sizes), 3)
        resumed.restore(positions[step])
        rest = [names(resumed.draw(count, later / total)) for later in range(step, total)]
        assert rest == drawn[step:]
        assert resumed.position == whole.position


def test_a_curriculum_opens_source_after_source() -> None:
    stream = PromptStream(task(2, 2, 2), 0)
    seen = [{name[0] for name in names(stream.draw(6, progress))} for progress in (0.0, 0.4, 0.8)]
    assert seen[0] == {"0"}
    assert "1" in seen[1]
    assert "2" not in seen[1]
    assert "2" in seen[2]


def test_a_task_without_training_problems_is_refused() -> None:
    with pytest.raises(ValueError, match="no training problems"):
        PromptStream(Task("made", [], [], None, (), ""), 0)


def test_the_fingerprint_names_items_and_order() -> None:
    assert PromptStream(task(3), 0).fingerprint == PromptStream(task(3), 1).fingerprint
    assert len({PromptStream(task(*sizes), 0).fingerprint for sizes in ((3,), (4,), (2, 1))}) == 3


def test_derived_seeds_share_nothing() -> None:
    seeds = {derive(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, "rollout", 2, 3) == derive(1, "rollout", 2, 3) != derive(1, "rollout", 23)
