"""The command line in processes of its own that die when told.

`python command_line.py` imports what training needs, once, and then forks a process for every request: a
line of JSON on standard input, `{"arguments": [...], "output": file, "die": null or [what, count, when]}`.
It answers with `{"pid": n}` and, when that process has ended, `{"status": n}` (negative: by that signal).
`die` makes the process kill itself at the count-th call of `what`, `before` or `after` it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# Imports only: a process that has computed something must not be forked.
IMPORTS = (
    "tokenloom.cli.app", "tokenloom.cli.outcome", "tokenloom.cli.progress", "tokenloom.cli.header",
    "tokenloom.train.loop", "tokenloom.train.trackers", "tokenloom.tasks.verifiers", "tokenloom.tasks.sources",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "safetensors.torch",
)  # fmt: skip

# Where a process can be told to die: the module or class, and its attribute.
PLACES = {
    "rename": ("os", "rename"),
    "replace": ("os", "replace"),
    "append": ("tokenloom.train.run:RunFolder", "append"),
    "update": ("tokenloom.train.optim:Optimizer", "step"),
    "rollout": ("tokenloom.train.respond", "generate"),
    "file": ("tokenloom.train.checkpoint", "save_file"),
    "cut": ("tokenloom.train.run:RunFolder", "cut"),
    "model": ("tokenloom.policy.policy", "save_policy"),
}


def die_at(what: str, count: int, when: str) -> None:
    """Make this process kill itself at the count-th call from now on."""
    module, _, kind = PLACES[what][0].partition(":")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    original: Callable[..., Any] = getattr(owner, PLACES[what][1])
    calls = 0

    def called(*args: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **rest)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, PLACES[what][1], called)


def run(request: dict[str, Any]) -> None:
    """In the child: the command line, its output in a file, its exit status that of the process."""
    status = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.argv = ["tokenloom", *request["arguments"]]
        if request["die"]:
            die_at(*request["die"])
        from tokenloom.cli import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork for every line of standard input."""
    for name in IMPORTS:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
