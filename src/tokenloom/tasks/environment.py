"""The multi-turn interface: the model speaks, the environment answers, until it says done.

What the environment says is appended to the response as tool output: the policy did not sample
it, so `mask` is False on it and no gradient flows through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tokenloom.tasks.item import Item, Message


@dataclass(frozen=True)
class Observation:
    """The start of an episode: a chat or a plain prompt, exactly one of them, as in `Item`."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("an observation has either `messages` or `text`, exactly one of them")


@dataclass(frozen=True)
class Step:
    """What follows one turn of the model.

    `observation` is plain text appended after the turn before the model speaks again (None or
    empty: nothing is appended); `reward` is added to the episode's; `done` ends it, and then
    `observation` is ignored; `info` is logged (`answer` and `correct`, if known, are shown).
    """

    observation: str | None = None
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
    """One episode at a time; an instance is reused by `reset` and shared by no two episodes at once."""

    def reset(self, item: Item, seed: int) -> Observation:
        """Starts an episode; equal items and seeds start equal episodes."""
        ...

    def step(self, response_text: str) -> Step:
        """Answers one turn: the text that the model wrote since the last observation."""
        ...
