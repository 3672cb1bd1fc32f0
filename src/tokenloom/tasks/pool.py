"""`WorkerPool`: verifiers in processes of their own, killed when they hang, replaced when they die.

A verifier may loop for ever in C, exit, crash, or print; only a process boundary contains that.
Workers are fresh interpreters (never forks of a process that holds a model), talk JSON lines over
pipes (nothing that a verifier returns is unpickled), and end with their parent.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tokenloom.tasks.outcome import Outcome
from tokenloom.tasks.process import Job, WorkerProcess
from tokenloom.tasks.stream import JobStream

_START_ATTEMPTS = 3
_LOST_IN_A_ROW = 16


class WorkerPool:
    """Persistent workers that score jobs.

    Args:
        verifiers: (name or import path, parameters) of each verifier.
        workers: processes at most; they are started when there is work for them.
        timeout: seconds for one job, from when a worker takes it; then the worker is killed.

    Sixteen workers that a verifier loses in a row in one stream, without a single outcome between them, end that
    verifier's part of it: its remaining jobs become errors that say so. The next stream tries again.
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
        self._streaming = self._stopping = False
        self._lost: Counter[int] = Counter()  # by verifier
        self._refusal: str | None = None

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
            worker = self._slots[0] = WorkerProcess(self._setup)
            try:
                worker.wait_until_ready()
            except BaseException:
                self.close()
                raise

    @contextmanager
    def stream(self) -> Iterator[JobStream]:
        """Takes jobs while the block runs; a job that hangs or kills its worker costs only itself.

        Leaving the block before all outcomes were asked for, above all through an exception, ends the workers at
        once; otherwise they stay for the next stream.

        Raises:
            RuntimeError: when another stream is open, whose workers these are.
        """
        if self._streaming:
            raise RuntimeError("the workers are scoring another batch; let it end first, or make a second verifier")
        self._lost.clear()
        self._refusal, self._stopping, self._streaming = None, False, True
        jobs = JobStream(self._score, len(self._slots))
        try:
            yield jobs
        finally:
            try:
                if not jobs.complete:
                    self.close()  # first, so that the threads blocked on workers return at once
                jobs.end()
            finally:
                self._streaming = False

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job, in order."""
        with self.stream() as stream:
            for job in jobs:
                stream.submit(job)
            return stream.outcomes()

    def close(self) -> None:
        """Ends all workers, also one that is just starting; safe to call twice, and from any thread."""
        self._stopping = True
        for slot, worker in enumerate(self._slots):
            if worker is not None:
                worker.kill()
                self._slots[slot] = None

    def _score(self, slot: int, number: int, job: Job) -> Outcome:
        refusal = self._refusal
        if self._stopping:
            refusal = "was not scored: the workers were ended before it"
        elif refusal is None and self._lost[job.verifier] >= _LOST_IN_A_ROW:
            refusal = f"was not scored: {_LOST_IN_A_ROW} workers in a row were lost before it"
        if refusal is not None:
            return Outcome(problem="error", message=refusal)
        try:
            worker = self._worker(slot)
        except (ValueError, OSError) as error:
            self._refusal = f"was not scored: no worker could be started: {error}"
            return Outcome(problem="error", message=self._refusal)
        outcome = worker.score(number, job, self._timeout)
        with self._lock:
            if worker.alive:
                self._lost[job.verifier], self._refusal = 0, None
            else:
                self._lost[job.verifier] += 1
                self._slots[slot] = None
        return outcome

    def _worker(self, slot: int) -> WorkerProcess:
        worker = self._slots[slot]
        if worker is not None and worker.alive:
            return worker
        failed = 0
        while True:
            try:
                # Known to `close` before it is ready, and killed here where `close` came first.
                worker = self._slots[slot] = WorkerProcess(self._setup)
                if self._stopping:
                    worker.kill()
                worker.wait_until_ready()
                return worker
            except (ValueError, OSError):
                failed += 1
                if failed == _START_ATTEMPTS or self._stopping:
                    raise
