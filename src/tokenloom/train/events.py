"""What a run tells its observers: the command line's progress, trackers, tests."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Receives the events of a run; every method may do nothing. Errors here stop the run, so catch your own."""

    def message(self, text: str) -> None:
        """A line worth reading: what is being done, or what went wrong and was survived."""

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Within a stage ("rollout", "update", "evaluate"): `done` of `total` rows, `tokens` so far."""

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """A training step ended: its line of metrics.jsonl and of timing.jsonl."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation ended: its line of metrics.jsonl."""

    def close(self) -> None:
        """The run ended, by whatever cause."""


class Silent:
    """An observer that does nothing; a base for those that care about some events."""

    def message(self, text: str) -> None:
        """Ignore."""

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Ignore."""

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """Ignore."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Ignore."""

    def close(self) -> None:
        """Ignore."""


class Observers(Silent):
    """Several observers as one."""

    def __init__(self, members: list[Observer]) -> None:
        self.members = members

    def message(self, text: str) -> None:
        """Tell all."""
        for member in self.members:
            member.message(text)

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Tell all."""
        for member in self.members:
            member.progress(stage, done, total, tokens)

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """Tell all."""
        for member in self.members:
            member.step(record, timing, total_steps)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Tell all."""
        for member in self.members:
            member.evaluation(record)

    def close(self) -> None:
        """Tell all."""
        for member in self.members:
            member.close()
