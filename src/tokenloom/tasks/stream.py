"""`JobStream`: jobs that workers take up as they come, and their outcomes once all have come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from tokenloom.tasks.outcome import Outcome
from tokenloom.tasks.process import Job


class JobStream:
    """Threads that wait for workers, so that whoever submits a job never does.

    Every job has exactly one outcome, whatever becomes of its worker: nobody waits in vain.

    Args:
        score: `(slot, number, job)` to the outcome of a job; called by one thread for each slot. It must return
            soon after the workers have been ended.
        slots: threads at most; they are started when there is work for them.
    """

    def __init__(self, score: Callable[[int, int, Job], Outcome], slots: int) -> None:
        self._score, self._slots = score, slots
        self._waiting: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._submitted = 0
        self._found: dict[int, Outcome] = {}

    @property
    def complete(self) -> bool:
        """Whether the outcome of every job has been asked for."""
        return len(self._found) == self._submitted

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait for a worker, and returns at once."""
        self._waiting.put((self._submitted, job))
        self._submitted += 1
        if len(self._threads) < self._slots:
            slot = len(self._threads)
            # Daemons: a process that ends must not wait for a verifier.
            thread = threading.Thread(target=self._serve, args=(slot,), name=f"tokenloom-verify-{slot}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def outcomes(self) -> list[Outcome]:
        """The outcomes of all jobs in the order of their submission, once there are all of them."""
        while not self.complete:
            number, outcome = self._done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            self._found[number] = outcome
        return [self._found[number] for number in range(self._submitted)]

    def end(self) -> None:
        """Lets the threads finish the jobs that wait, which is done at once when the workers have been ended."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, slot: int) -> None:
        while (task := self._waiting.get()) is not None:
            number, job = task
            try:
                self._done.put((number, self._score(slot, number, job)))
            except BaseException as error:  # a mistake of ours, shown where the outcomes are asked for
                self._done.put((number, error))
