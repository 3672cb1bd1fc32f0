"""`WorkerPool`: verifiers in processes of their own, killed when they hang, replaced when they die.

A verifier may loop for ever in C, exit, crash, or print; only a process boundary contains that.
Workers are fresh interpreters (never forks of a process that holds a model), talk JSON lines over
pipes (nothing that a verifier returns is unpickled), and end with their parent.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from tokenloom.tasks.outcome import Outcome
from tokenloom.tasks.process import Job, WorkerProcess

_START_ATTEMPTS = 3
_LOST_IN_A_ROW = 16


class WorkerPool:
    """Persistent workers that score jobs.

    Args:
        verifiers: (name or import path, parameters) of each verifier.
        workers: processes at most; they are started when there is work for them.
        timeout: seconds for one job, after which its worker is killed.

    Sixteen workers lost in a row in one call without a single outcome between them end that call:
    its remaining jobs become errors that say so. The next call tries again.
    """

    def __init__(self, verifiers: Sequence[tuple[str, Mapping[str, Any]]], *, workers: int, timeout: float) -> None:
        self._setup = {
            "verifiers": [{"name": name, "params": dict(params)} for name, params in verifiers],
            "path": [entry or os.getcwd() for entry in sys.path],
            "timeout": timeout,
        }
        self._timeout = timeout
        self._slots: list[WorkerProcess | None] = [None] * workers
        self._lock = threading.Lock()
        self._stopping = False
        self._lost = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts one worker, to learn now whether the verifiers can be loaded.

        Raises:
            ValueError: when one cannot, with what it said.
        """
        self._stopping = False
        if self._slots[0] is None:
            self._slots[0] = WorkerProcess(self._setup)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job, in order; a job that hangs or kills its worker costs only itself."""
        outcomes: list[Outcome] = [Outcome(problem="error", message="was not scored")] * len(jobs)
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            waiting.put(index)
        self._lost, self._stopping = 0, False
        threads = min(len(self._slots), len(jobs))
        if not threads:
            return outcomes
        with ThreadPoolExecutor(threads, thread_name_prefix="tokenloom-verify") as executor:
            try:
                futures = [executor.submit(self._drain, slot, jobs, waiting, outcomes) for slot in range(threads)]
                for future in futures:
                    future.result()
            except BaseException:
                self.close()  # ends the workers, so that the threads blocked on them return at once
                raise
        return outcomes

    def close(self) -> None:
        """Ends all workers; safe to call twice, and while `run` is interrupted."""
        self._stopping = True
        for slot, worker in enumerate(self._slots):
            if worker is not None:
                worker.kill()
                self._slots[slot] = None

    def _drain(self, slot: int, jobs: Sequence[Job], waiting: queue.SimpleQueue[int], outcomes: list[Outcome]) -> None:
        while not self._stopping:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            if self._lost >= _LOST_IN_A_ROW:
                message = f"was not scored: {_LOST_IN_A_ROW} workers in a row were lost before it"
                outcomes[index] = Outcome(problem="error", message=message)
                continue
            outcomes[index] = self._score(slot, index, jobs[index])

    def _score(self, slot: int, index: int, job: Job) -> Outcome:
        try:
            worker = self._worker(slot)
        except (ValueError, OSError) as error:
            with self._lock:
                self._lost = _LOST_IN_A_ROW
            return Outcome(problem="error", message=f"was not scored: no worker could be started: {error}")
        outcome = worker.score(index, job, self._timeout)
        if worker.alive:
            with self._lock:
                self._lost = 0
        else:
            self._slots[slot] = None
            with self._lock:
                self._lost += 1
        return outcome

    def _worker(self, slot: int) -> WorkerProcess:
        worker = self._slots[slot]
        if worker is not None and worker.alive:
            return worker
        for attempt in range(_START_ATTEMPTS):
            try:
                worker = WorkerProcess(self._setup)
                break
            except (ValueError, OSError):
                if attempt == _START_ATTEMPTS - 1 or self._stopping:
                    raise
        assert worker is not None
        self._slots[slot] = worker
        if self._stopping:
            worker.kill()
        return worker
