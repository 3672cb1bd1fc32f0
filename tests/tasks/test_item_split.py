"""Items are their content; splits depend on the set of prompts and on nothing else."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.tasks import Item, split_items
from tokenloom.tasks.split import Split, heldout_count, prove_disjoint, split_given

PINNED = "d1666adcb12dce6284ed9483979396c5bdc1eedfe4133496a6608845fea8f60a"
PROMPTS = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=40)


def test_key_is_pinned() -> None:
    # A changed key would silently move every user's problems between training and evaluation.
    assert hashlib.sha256(b'[["user", "2 + 2 ="]]').hexdigest() == PINNED
    assert Item(prompt="2 + 2 =").key == PINNED


def test_key_is_content_only() -> None:
    plain = Item(prompt="caf\u00e9 ", answer=1, metadata={"a": 1})
    chat = Item(messages=({"content": "cafe\u0301", "role": "user"},), answer=2)
    assert plain.key == chat.key
    assert plain.key != Item(prompt="Caf\u00e9").key
    assert chat.key != Item(messages=({"role": "assistant", "content": "caf\u00e9"},)).key
    two = Item(messages=({"role": "user", "content": "a"}, {"role": "user", "content": "b"}))
    assert two.key != Item(messages=({"role": "user", "content": "ab"},)).key


def test_lone_surrogates_have_a_key() -> None:
    assert len(Item(prompt="\ud800").key) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "messages": ({"role": "user", "content": "a"},)}, "exactly one"),
        ({"messages": ()}, "non-empty"),
        ({"messages": ({"role": "user"},)}, "`content` of message 1 of 1 is missing"),
        ({"messages": ({"role": "user", "content": 3},)}, "is int, not text"),
        ({"messages": ("hello",)}, "message 1 of 1 must be an object"),
    ],
)
def test_malformed_items_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Item(**arguments)  # type: ignore[arg-type]  # the mistake is the point


def test_round_trip_and_text() -> None:
    item = Item(messages=({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), answer=[1])
    assert Item.from_dict(item.to_dict()) == item
    assert item.text == "system: s\nuser: u"


@given(PROMPTS, st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_split_ignores_order_and_copies(prompts: list[str], fraction: float, shuffle: random.Random) -> None:
    items = [Item(prompt=prompt) for prompt in prompts]
    distinct = len({item.key for item in items})
    if distinct < 2:
        return
    first = split_items(items, heldout_fraction=fraction)
    again = [*items, *items[:3]]
    shuffle.shuffle(again)
    second = split_items(again, heldout_fraction=fraction)
    assert [item.key for item in first.train] == [item.key for item in second.train]
    assert [item.key for item in first.heldout] == [item.key for item in second.heldout]
    assert not {item.key for item in first.train} & {item.key for item in first.heldout}
    assert len(first.train) + len(first.heldout) == distinct
    assert len(first.heldout) == min(max(round(distinct * fraction), 1), distinct - 1)


def test_halves_are_exact() -> None:
    split = split_items([Item(prompt=str(n)) for n in range(200)], heldout_fraction=0.5)
    assert (len(split.train), len(split.heldout)) == (100, 100)
    # By content, not by position: a split in order would hold out a contiguous range.
    assert {int(item.prompt or "") for item in split.heldout} != set(range(100))


def test_sizes() -> None:
    items = [Item(prompt=str(n)) for n in range(10)]
    assert len(split_items(items, heldout_size=3).heldout) == 3
    with pytest.raises(ValueError, match="between 1 and 9"):
        split_items(items, heldout_size=10)
    with pytest.raises(ValueError, match="exactly one"):
        split_items(items)
    with pytest.raises(ValueError, match="strictly between"):
        split_items(items, heldout_fraction=1.0)
    with pytest.raises(ValueError, match="at least 2 distinct"):
        heldout_count(1, 0.5)


def test_conflicting_answers_are_reported() -> None:
    items = [
        Item(prompt="a", answer=1),
        Item(prompt="a ", answer=2),
        Item(prompt="b", answer=1),
        Item(prompt="b", answer=1),
    ]
    split = split_items(items, heldout_size=1)
    assert (split.drawn, split.duplicates, len(split.conflicts)) == (4, 2, 1)
    assert {item.answer for item in (*split.train, *split.heldout)} == {1}
    assert "1 training and 1 held-out" in split.summary()
    assert "more than one answer" in split.summary()


def test_overlap_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="1 held-out problems are also trained on, such as ' a'"):
        Split((Item(prompt="a"),), (Item(prompt=" a"),), 2)
    prove_disjoint([Item(prompt="a")], [Item(prompt="b")])


def test_given_sides_lose_what_they_share() -> None:
    split = split_given([Item(prompt=p) for p in "abcc"], [Item(prompt=p) for p in "cd"])
    assert {item.prompt for item in split.train} == {"a", "b"}
    assert "1 training items also appear" in split.summary()
    with pytest.raises(ValueError, match="training side is empty"):
        split_given([Item(prompt="a")], [Item(prompt="a")])
