"""`WorkerProcess`: the parent's end of one worker, which it can always get rid of."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tokenloom.tasks.item import Item
from tokenloom.tasks.outcome import Outcome

STARTUP_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """One response to be scored by the pool's verifier number `verifier`."""

    verifier: int
    response: str
    item: Item


class WorkerProcess:
    """One process; `alive` turns False for ever once it was killed or found dead.

    Made by one thread and ready after `wait_until_ready`; `kill` may come from any other, at any time.

    Args:
        setup: what the worker needs to start: its verifiers, `sys.path`, and the timeout.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        environment = dict(os.environ)
        package_root = str(Path(__file__).resolve().parents[2])
        inherited = filter(None, [environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join([package_root, *inherited])
        self.alive = True
        self._setup = dict(setup)
        # What it says before it is ready explains why it could not start.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `wait_until_ready`
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenloom.tasks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=environment,
                start_new_session=os.name == "posix",
            )
        except BaseException:
            self._said.close()
            raise
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pipes = (self._process.stdin, self._process.stdout)
        threading.Thread(target=_pump, args=(*pipes, self._outgoing, self._incoming), daemon=True).start()

    def wait_until_ready(self) -> None:
        """Returns when the verifiers are loaded there; to be called once.

        Raises:
            ValueError: when the process does not become ready, with what it said.
        """
        with self._said as said:
            reply, timed_out = self._exchange(self._setup, STARTUP_SECONDS)
            if reply is not None and reply.get("ready") is True:
                return
            self.kill()
            said.seek(0)
            last = said.read().decode("utf-8", "replace").strip()[-2000:]
        if reply is not None:
            raise ValueError(str(reply.get("failed", "a worker process answered nonsense while it started")))
        names = ", ".join(repr(verifier["name"]) for verifier in self._setup["verifiers"])
        how = f"took over {STARTUP_SECONDS:.0f} s" if timed_out else f"ended with {self._ending()}"
        said_last = f"; it said:\n{last}" if last else ""
        raise ValueError(f"a worker process for the verifiers {names} {how} while it started{said_last}")

    def score(self, number: int, job: Job, timeout: float) -> Outcome:
        """The outcome of a job, killing the process if it takes longer than `timeout` seconds."""
        message = {
            "id": number,
            "verifier": job.verifier,
            "response": job.response,
            "item": job.item.to_dict(),
        }
        try:
            reply, timed_out = self._exchange(message, timeout)
        except (TypeError, ValueError, RecursionError) as error:
            # Nothing was sent, the worker is unharmed.
            return Outcome(problem="error", message=f"could not be given the item, which is not JSON: {error}")
        if timed_out:
            return Outcome(problem="timeout", message=f"took over {timeout:g} s and was killed")
        if reply is None:
            return Outcome(problem="error", message=f"ended its worker process with {self._ending()}")
        try:
            if reply["id"] != number:
                raise ValueError
            return Outcome(float(reply["reward"]), reply["answer"], reply["problem"], str(reply["message"]))
        except (KeyError, TypeError, ValueError):
            self.kill()
            return Outcome(problem="error", message="wrote nonsense into its worker's reply")

    def kill(self) -> None:
        """Ends the process and, where the system has sessions, everything that it started in its own."""
        self.alive = False
        # Until it is waited for, its number (and so its group's) is nobody else's.
        if os.name == "posix" and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._outgoing.put(None)
        # Whoever waits for a reply stops now, even where a grandchild holds the pipe open.
        self._incoming.put(b"")

    def _exchange(self, message: Mapping[str, Any], timeout: float) -> tuple[dict[str, Any] | None, bool]:
        """The reply if there was one, and whether time ran out; without a reply the process is killed."""
        self._outgoing.put(json.dumps(message).encode("ascii") + b"\n")
        try:
            line = self._incoming.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            return None, True
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # for its own exit status rather than that of being killed
            self.kill()
            return None, False
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        return (reply if isinstance(reply, dict) else {}), False

    def _ending(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"


def _pump(
    stdin: IO[bytes],
    stdout: IO[bytes],
    outgoing: queue.SimpleQueue[bytes | None],
    incoming: queue.SimpleQueue[bytes],
) -> None:
    """Writes each message and reads one line for it, on a thread of its own.

    Both ends may block for as long as some process holds the pipe, even after the worker is dead
    (a grandchild may have inherited it); so nobody waits here, and the thread closes its own pipes.
    """
    try:
        while (message := outgoing.get()) is not None:
            stdin.write(message)
            stdin.flush()
            incoming.put(stdout.readline())
    except (OSError, ValueError):
        incoming.put(b"")
    finally:
        for pipe in (stdin, stdout):
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
