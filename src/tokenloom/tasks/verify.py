"""`Verifier`: scores responses with the task's rewards, whatever a verifier does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tokenloom.tasks.config import RewardConfig, TaskConfig
from tokenloom.tasks.item import Item
from tokenloom.tasks.outcome import Outcome, call
from tokenloom.tasks.pool import WorkerPool
from tokenloom.tasks.process import Job
from tokenloom.tasks.stream import JobStream
from tokenloom.tasks.verifiers import IN_PROCESS, load

_log = logging.getLogger(__name__)
_MESSAGES = 20
_CORRECT = 1.0 - 1e-9


@dataclass(frozen=True)
class Scores:
    """What the verifiers said of n responses.

    `rewards` [n] is the weighted sum of `components` ({verifier: [n]}, unweighted); `answers` [n]
    is what the first verifier with an opinion parsed out of each response; `correct` [n] says
    whether the first reward reached its maximum, 1. `errors` counts the calls that raised, died or
    returned something other than a finite number, `timeouts` those that were killed; each gave its
    component a zero. `messages` explain them, equal ones once with their count.
    """

    rewards: list[float]
    components: dict[str, list[float]]
    answers: list[Any]
    correct: list[bool]
    errors: int
    timeouts: int
    messages: list[str]


class Verifier:
    """The rewards of a task, ready to score; a context manager, since it may own processes.

    Built-in verifiers that cannot hang run in this process, all others in a pool of workers.
    """

    _pool: WorkerPool | None = None  # so too of a subclass that does nothing but `score` in its own way

    def __init__(self, config: TaskConfig) -> None:
        self._rewards = config.all_rewards
        self._names = _component_names(self._rewards)
        self._pooled = [i for i, reward in enumerate(self._rewards) if reward.verifier not in IN_PROCESS]
        if self._pooled:
            verifiers = [(self._rewards[i].verifier, self._rewards[i].params) for i in self._pooled]
            self._pool = WorkerPool(verifiers, workers=config.workers, timeout=config.timeout)

    def __enter__(self) -> Self:
        """Starts a worker if one is needed.

        Raises:
            ValueError: when a verifier cannot be loaded there, with what it said.
        """
        if self._pool is not None:
            self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def score(self, items: Sequence[Item], responses: Sequence[str]) -> Scores:
        """Scores response i as an answer to item i.

        Nothing that a verifier does raises here: see `Scores` for what it costs instead.

        Raises:
            ValueError: when the lengths differ.
        """
        if len(items) != len(responses):
            raise ValueError(f"{len(items)} items and {len(responses)} responses; give one item per response")
        jobs = [job for pair in zip(items, responses, strict=True) for job in self._jobs(*pair)]
        return self._scores(items, responses, [] if self._pool is None else self._pool.run(jobs))

    @contextmanager
    def stream(self, items: Sequence[Item]) -> Iterator[ScoreStream]:
        """Scores responses to `items` while others are still being written; see `ScoreStream`.

        Leaving the block through an exception ends the workers at once, whatever they are at.

        Raises:
            RuntimeError: when another stream of this verifier is open.
        """
        with nullcontext() if self._pool is None else self._pool.stream() as jobs:
            yield ScoreStream(self, items, jobs)

    def _jobs(self, item: Item, response: str) -> list[Job]:
        """What the workers have to do for a response, reward by reward."""
        return [Job(number, response, item) for number in range(len(self._pooled))]

    def _scores(self, items: Sequence[Item], responses: Sequence[str], pooled: Sequence[Outcome]) -> Scores:
        """The scores, given what became of the `_jobs` of the responses, one after the other."""
        outcomes = self._outcomes(items, responses, pooled)
        problems = Counter(
            (name, outcome.problem, outcome.message)
            for name, column in zip(self._names, outcomes, strict=True)
            for outcome in column
            if outcome.problem is not None
        )
        return Scores(
            rewards=[
                sum(reward.weight * outcome.reward for reward, outcome in zip(self._rewards, row, strict=True))
                for row in zip(*outcomes, strict=True)
            ],
            components={
                name: [outcome.reward for outcome in column] for name, column in zip(self._names, outcomes, strict=True)
            },
            answers=[
                next((outcome.answer for outcome in row if outcome.answer is not None), None)
                for row in zip(*outcomes, strict=True)
            ],
            correct=[outcome.reward >= _CORRECT for outcome in outcomes[0]],
            errors=sum(count for (_, problem, _), count in problems.items() if problem == "error"),
            timeouts=sum(count for (_, problem, _), count in problems.items() if problem == "timeout"),
            messages=_reported(problems),
        )

    def _outcomes(
        self, items: Sequence[Item], responses: Sequence[str], pooled: Sequence[Outcome]
    ) -> list[list[Outcome]]:
        """[reward][response]; what has no process of its own is called here and now."""
        outcomes: list[list[Outcome]] = []
        for i, reward in enumerate(self._rewards):
            if i in self._pooled:
                outcomes.append(list(pooled[self._pooled.index(i) :: len(self._pooled)]))
            else:
                function = load(reward.verifier)
                pairs = zip(items, responses, strict=True)
                outcomes.append([call(function, response, item, reward.params) for item, response in pairs])
        return outcomes


class ScoreStream:
    """Responses as they come, in any order; made by `Verifier.stream`.

    Workers begin with a response when it is added. Verifiers without a process are called by `scores`, so that they
    take no time from whoever adds. The scores are those of `Verifier.score`.
    """

    def __init__(self, verifier: Verifier, items: Sequence[Item], jobs: JobStream | None) -> None:
        self._verifier, self._items, self._jobs = verifier, items, jobs
        self._responses: dict[int, str] = {}

    def add(self, row: int, response: str) -> None:
        """Takes the response to `items[row]`, without waiting for anything.

        Raises:
            ValueError: when there is no such row, or it has a response.
        """
        if not 0 <= row < len(self._items):
            raise ValueError(f"row {row} is none of the {len(self._items)} items, which count from 0")
        if row in self._responses:
            raise ValueError(f"row {row} has a response already; each item takes one")
        self._responses[row] = response
        if self._jobs is not None:
            for job in self._verifier._jobs(self._items[row], response):
                self._jobs.submit(job)

    @property
    def responses(self) -> list[str]:
        """The responses in the order of the items.

        Raises:
            ValueError: when some are missing.
        """
        missing = len(self._items) - len(self._responses)
        if missing:
            raise ValueError(f"{missing} of {len(self._items)} items have no response yet; add one for each")
        return [self._responses[row] for row in range(len(self._items))]

    def scores(self) -> Scores:
        """The scores of all responses, in the order of the items; waits for the workers.

        Raises:
            ValueError: when responses are missing.
        """
        responses = self.responses
        if self._jobs is None:
            return self._verifier.score(self._items, responses)
        outcomes = self._jobs.outcomes()
        each = len(outcomes) // max(len(responses), 1)
        of_row = {row: outcomes[i * each : (i + 1) * each] for i, row in enumerate(self._responses)}
        pooled = [outcome for row in range(len(responses)) for outcome in of_row[row]]
        return self._verifier._scores(self._items, responses, pooled)


def _component_names(rewards: Sequence[RewardConfig]) -> list[str]:
    """The verifiers' names, with `#2`, `#3` on repetitions so that no column hides another."""
    seen: Counter[str] = Counter()
    names = []
    for reward in rewards:
        seen[reward.verifier] += 1
        count = seen[reward.verifier]
        names.append(reward.verifier if count == 1 else f"{reward.verifier}#{count}")
    return names


def _reported(problems: Counter[tuple[str, Any, str]]) -> list[str]:
    """One line for each kind of problem, commonest first, logged as warnings."""
    lines = [
        f"verifier {name!r} {message} (reward 0 for {count} response{'s' if count > 1 else ''})"
        for (name, _, message), count in problems.most_common(_MESSAGES)
    ]
    if len(problems) > _MESSAGES:
        lines.append(f"and {len(problems) - _MESSAGES} more kinds of problems")
    for line in lines:
        _log.warning("%s", line)
    return lines
