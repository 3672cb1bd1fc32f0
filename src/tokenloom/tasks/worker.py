"""A worker process: reads jobs as JSON lines, runs verifiers on its main thread, writes outcomes.

Started by `tokenloom.tasks.pool` as `python -m tokenloom.tasks.worker`, never imported by it. It
imports neither torch nor transformers. Whatever a verifier prints goes nowhere, since the pipe to the parent
is moved away from standard output first; the process ends when its parent does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any, BinaryIO

from tokenloom.tasks.item import Item
from tokenloom.tasks.outcome import VerifierFunction, call, describe
from tokenloom.tasks.verifiers import check_params, load, prepare

_GRACE = 5.0


def main() -> None:
    """Serves until the parent closes the pipe."""
    # Ctrl-C reaches the whole terminal group; the parent decides when workers end.
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    threading.Thread(target=_listen, args=(requests, jobs), daemon=True).start()
    setup = json.loads(jobs.get())
    sys.path.extend(entry for entry in setup["path"] if entry not in sys.path)
    functions: list[VerifierFunction] = []
    for verifier in setup["verifiers"]:
        try:
            functions.append(load(verifier["name"]))
            prepare(verifier["name"])
            check_params(verifier["name"], functions[-1], verifier["params"])
        except BaseException as error:  # a module may even exit while it is imported
            _write(replies, {"failed": f"verifier {verifier['name']!r} cannot be loaded: {describe(error)}"})
            return
    os.dup2(nowhere, 2)
    _write(replies, {"ready": True})
    limit = float(setup["timeout"]) + _GRACE
    while True:
        job = json.loads(jobs.get())
        # A watchdog in C, so that a worker whose parent was killed ends even if the verifier
        # never lets go of the interpreter. While the parent lives it kills earlier than this.
        faulthandler.dump_traceback_later(limit, exit=True, file=nowhere)
        index = job["verifier"]
        outcome = call(
            functions[index],
            job["response"],
            Item.from_dict(job["item"]),
            setup["verifiers"][index]["params"],
        )
        faulthandler.cancel_dump_traceback_later()
        _write(replies, {"id": job["id"], **asdict(outcome)})


def _listen(requests: BinaryIO, jobs: queue.SimpleQueue[bytes]) -> None:
    """Hands lines over and ends the process with the pipe, whatever the main thread is doing."""
    for line in requests:
        jobs.put(line)
    os._exit(0)


def _write(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
