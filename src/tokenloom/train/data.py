"""The order in which prompts are drawn: reproducible, resumable, epoch by epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from tokenloom.tasks import Item, Task
from tokenloom.tasks.config import TierConfig
from tokenloom.tasks.sources.corpus import shown


class PromptStream:
    """Draws training items without replacement, each epoch in a new order decided by (seed, epoch).

    `position` is all there is to save. With a curriculum the open items change with progress; an epoch then
    runs over what is open when it starts. With `tiers` every draw samples each prompt's tier with the shares of
    that moment and then the tier's items uniformly, none twice in a draw while the tier lasts.

    Raises:
        ValueError: for a task without training items, or without any of a tier that is to be drawn.
    """

    def __init__(self, task: Task, seed: int, tiers: TierConfig | None = None) -> None:
        if not task.train:
            raise ValueError(f"task {task.name!r} has no training problems; lower task.heldout or raise task.size")
        self.task, self.seed, self.tiers = task, seed, tiers
        self._tiers = {} if tiers is None else _by_tier(task, tiers)
        self.epoch, self.offset, self.opened = 0, 0, 0
        self._order: list[Item] = []

    def draw(self, count: int, progress: float) -> list[Item]:
        """The next `count` items at `progress` in [0, 1] of the run; an epoch's end is crossed silently."""
        return [shown(item, progress) for item in self._draw(count, progress)]

    def _draw(self, count: int, progress: float) -> list[Item]:
        if self.tiers is not None:
            return self._draw_tiers(count, self.tiers.at(progress))
        items: list[Item] = []
        while len(items) < count:
            if self.offset >= self.opened or not self._order:
                if self.opened:
                    self.epoch, self.offset = self.epoch + 1, 0
                self._start(self.task.stage(progress))
            take = self._order[self.offset : self.offset + count - len(items)]
            self.offset += len(take)
            items += take
        return items

    def _draw_tiers(self, count: int, shares: Mapping[str, float]) -> list[Item]:
        generator = torch.Generator().manual_seed(derive(self.seed, "tiers", self.offset))
        names = list(shares)
        law = torch.tensor([shares[n] for n in names], dtype=torch.float64)
        drawn = torch.multinomial(law, count, replacement=True, generator=generator).tolist()
        orders = {n: torch.randperm(len(found), generator=generator).tolist() for n, found in self._tiers.items()}
        taken = dict.fromkeys(names, 0)
        items = []
        for name in (names[i] for i in drawn):
            found, order = self._tiers[name], orders[name]
            items.append(found[order[taken[name] % len(order)]])
            taken[name] += 1
        self.offset += count
        return items

    @property
    def position(self) -> dict[str, int]:
        """What `restore` takes."""
        return {"epoch": self.epoch, "offset": self.offset, "opened": self.opened}

    def restore(self, position: dict[str, int]) -> None:
        """Continue from a saved position."""
        self.epoch, self.offset, self.opened = position["epoch"], position["offset"], position["opened"]
        if self.opened and self.tiers is None:
            # Sources open in order, so the first `opened` training items by stage are the open ones.
            flat = [item for stage in self.task.stages for item in stage]
            self._start(flat[: self.opened])

    @property
    def fingerprint(self) -> str:
        """Names the training items and their order: a position means nothing among others."""
        digest = hashlib.sha256()
        for item in self.task.train:
            digest.update(f"{item.key}\n".encode())
        return digest.hexdigest()

    def _start(self, items: Sequence[Item]) -> None:
        generator = torch.Generator().manual_seed(derive(self.seed, "prompts", self.epoch))
        order = torch.randperm(len(items), generator=generator).tolist()
        self._order, self.opened = [items[i] for i in order], len(items)


def _by_tier(task: Task, tiers: TierConfig) -> dict[str, list[Item]]:
    """The training items of every tier that is ever drawn."""
    wanted = [name for name in tiers.first if tiers.first[name] or tiers.last[name]]
    found = {name: [item for item in task.train if item.metadata.get("tier") == name] for name in wanted}
    if missing := sorted(name for name, items in found.items() if not items):
        there = sorted({str(item.metadata["tier"]) for item in task.train if "tier" in item.metadata})
        raise ValueError(
            f"task.tiers: no training problem of {task.name!r} is of tier {missing}; tiers that are there: {there}. "
            "An item's tier is its key `tier`"
        )
    return found


def derive(seed: int, *parts: object) -> int:
    """A seed for one purpose, in [0, 2**63): a hash, so that neighboring seeds and steps share nothing."""
    text = "/".join(str(p) for p in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
