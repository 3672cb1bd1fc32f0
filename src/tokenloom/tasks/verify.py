"""`Verifier`: scores responses with the task's rewards, whatever a verifier does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tokenloom.tasks.config import RewardConfig, TaskConfig
from tokenloom.tasks.item import Item
from tokenloom.tasks.outcome import Outcome, call
from tokenloom.tasks.pool import WorkerPool
from tokenloom.tasks.process import Job
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

    def __init__(self, config: TaskConfig) -> None:
        self._rewards = config.all_rewards
        self._names = _component_names(self._rewards)
        pooled = [reward for reward in self._rewards if reward.verifier not in IN_PROCESS]
        self._pool_index = {id(reward): index for index, reward in enumerate(pooled)}
        self._pool: WorkerPool | None = None
        if pooled:
            verifiers = [(reward.verifier, reward.params) for reward in pooled]
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
        outcomes = self._outcomes(items, responses)
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

    def _outcomes(self, items: Sequence[Item], responses: Sequence[str]) -> list[list[Outcome]]:
        """[reward][response]; the jobs of all pooled rewards go to the workers together."""
        pairs = list(zip(items, responses, strict=True))
        jobs = [
            Job(self._pool_index[id(reward)], response, item)
            for reward in self._rewards
            if id(reward) in self._pool_index
            for item, response in pairs
        ]
        from_pool = iter(self._pool.run(jobs) if self._pool is not None else [])
        outcomes: list[list[Outcome]] = []
        for reward in self._rewards:
            if id(reward) in self._pool_index:
                outcomes.append([next(from_pool) for _ in pairs])
            else:
                function = load(reward.verifier)
                outcomes.append([call(function, response, item, reward.params) for item, response in pairs])
        return outcomes


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
