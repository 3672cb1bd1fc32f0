"""The order in which prompts are drawn: reproducible, resumable, epoch by epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from tokenloom.tasks import Item, Task


class PromptStream:
    """Draws training items without replacement, each epoch in a new order decided by (seed, epoch).

    `position` is all there is to save. With a curriculum the open items change with progress; an epoch then
    runs over what is open when it starts.

    Raises:
        ValueError: for a task without training items.
    """

    def __init__(self, task: Task, seed: int) -> None:
        if not task.train:
            raise ValueError(f"task {task.name!r} has no training problems; lower task.heldout or raise task.size")
        self.task, self.seed = task, seed
        self.epoch, self.offset, self.opened = 0, 0, 0
        self._order: list[Item] = []

    def draw(self, count: int, progress: float) -> list[Item]:
        """The next `count` items at `progress` in [0, 1] of the run; an epoch's end is crossed silently."""
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

    @property
    def position(self) -> dict[str, int]:
        """What `restore` takes."""
        return {"epoch": self.epoch, "offset": self.offset, "opened": self.opened}

    def restore(self, position: dict[str, int]) -> None:
        """Continue from a saved position."""
        self.epoch, self.offset, self.opened = position["epoch"], position["offset"], position["opened"]
        if self.opened:
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


def derive(seed: int, *parts: object) -> int:
    """A seed for one purpose, in [0, 2**63): a hash, so that neighboring seeds and steps share nothing."""
    text = "/".join(str(p) for p in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
