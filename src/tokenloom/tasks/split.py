"""Train and held-out items, split by the content of their prompts and proved disjoint.

Never by seed: item i of a reasoning-gym data set under seed s is item i - 1 under seed s + 1,
so two seeds share nearly all their items.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenloom.tasks.item import Item


@dataclass(frozen=True)
class Split:
    """The two sides of a task, each in the order of the items' keys.

    `drawn` items came in; `duplicates` repeated the prompt of an earlier one (the first is kept);
    `conflicts` are the prompts whose copies disagreed about the answer; `notes` say what else a
    user should know.
    """

    train: tuple[Item, ...]
    heldout: tuple[Item, ...]
    drawn: int
    duplicates: int = 0
    conflicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        prove_disjoint(self.train, self.heldout)

    def summary(self) -> str:
        """A few lines to print: sizes, what was dropped, and that the sides share no prompt."""
        lines = [
            f"{len(self.train)} training and {len(self.heldout)} held-out problems; no prompt is in both "
            "(checked by a hash of each prompt's content)"
        ]
        if self.duplicates:
            lines.append(f"{self.duplicates} of {self.drawn} items repeated an earlier prompt and were dropped")
        if self.conflicts:
            shown = "; ".join(json.dumps(text[:60], ensure_ascii=False) for text in self.conflicts[:3])
            lines.append(
                f"warning: {len(self.conflicts)} prompts came with more than one answer; "
                f"the first one seen is kept: {shown}"
            )
        return "\n".join([*lines, *self.notes])


def dedupe(items: Iterable[Item]) -> tuple[list[Item], int, tuple[str, ...]]:
    """The first item of each key in the order of arrival, the number dropped, and conflicting prompts."""
    first: dict[str, Item] = {}
    conflicts: dict[str, str] = {}
    dropped = 0
    for item in items:
        kept = first.setdefault(item.key, item)
        if kept is not item:
            dropped += 1
            if kept.answer != item.answer:
                conflicts[item.key] = item.text
    return list(first.values()), dropped, tuple(conflicts.values())


def heldout_count(total: int, heldout: float | int) -> int:
    """How many of `total` distinct items are held out: a fraction in (0, 1) rounded, or a count.

    Both sides keep at least one item.

    Raises:
        ValueError: when fewer than two items exist or the count leaves no training item.
    """
    if total < 2:
        raise ValueError(f"a task needs at least 2 distinct problems (one to train on, one held out), found {total}")
    if isinstance(heldout, float):
        return min(max(round(total * heldout), 1), total - 1)
    if not 1 <= heldout < total:
        raise ValueError(
            f"heldout={heldout} of {total} distinct problems leaves no training problem; "
            f"use a count between 1 and {total - 1}, or a fraction such as 0.2"
        )
    return heldout


def split_items(
    items: Iterable[Item], *, heldout_fraction: float | None = None, heldout_size: int | None = None
) -> Split:
    """De-duplicates items by content and cuts them in two by the order of their keys.

    Which side an item falls on depends on the set of prompts only: not on their order, a seed
    or the answers. Exactly one of `heldout_fraction` (0 < x < 1; the sizes are exact, so 0.5 of
    200 is 100 and 100) and `heldout_size` is given.

    Raises:
        ValueError: when the options contradict each other or leave a side empty.
    """
    if (heldout_fraction is None) == (heldout_size is None):
        raise ValueError("give exactly one of heldout_fraction and heldout_size")
    if heldout_fraction is not None and not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must lie strictly between 0 and 1, got {heldout_fraction}")
    kept, dropped, conflicts = dedupe(items)
    kept.sort(key=lambda item: item.key)
    wanted = float(heldout_fraction) if heldout_fraction is not None else int(heldout_size or 0)
    count = heldout_count(len(kept), wanted)
    return Split(tuple(kept[count:]), tuple(kept[:count]), len(kept) + dropped, dropped, conflicts)


def split_given(train: Iterable[Item], heldout: Iterable[Item]) -> Split:
    """Sides that the user chose; training items whose prompt is held out are dropped and noted.

    Raises:
        ValueError: when a side is empty afterwards.
    """
    held, held_dropped, held_conflicts = dedupe(heldout)
    kept, dropped, conflicts = dedupe(train)
    held_keys = {item.key for item in held}
    apart = sorted((item for item in kept if item.key not in held_keys), key=lambda item: item.key)
    held.sort(key=lambda item: item.key)
    if not apart or not held:
        side = "training" if not apart else "held-out"
        raise ValueError(f"the {side} side is empty after dropping repeated prompts and prompts found on both sides")
    shared = len(kept) - len(apart)
    notes = (f"{shared} training items also appear in the held-out source and were dropped",) if shared else ()
    drawn = len(kept) + dropped + len(held) + held_dropped
    return Split(tuple(apart), tuple(held), drawn, dropped + held_dropped, (*conflicts, *held_conflicts), notes)


def prove_disjoint(train: Sequence[Item], heldout: Sequence[Item]) -> None:
    """Raises ValueError, with an example, if any prompt is on both sides."""
    trained = {item.key for item in train}
    shared = [item for item in heldout if item.key in trained]
    if shared:
        raise ValueError(
            f"{len(shared)} held-out problems are also trained on, such as {shared[0].text[:80]!r}; "
            "evaluation on them would measure memory"
        )
