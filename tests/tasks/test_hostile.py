"""Verifiers that raise, hang, die, print and lie cost their own sample and nothing else.

All through real worker processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.processes import awaited, lives
from tokenloom.tasks import Item, RewardConfig, TaskConfig, Verifier

HOSTILE = """
import ctypes, os, sys, time

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

class Endless(str):
    pass

def judge(response, item):
    if response == "hang":
        while True:
            pass
    if response == "sleep":
        time.sleep(1000)
    if response == "raise":
        raise KeyError("oops")
    if response == "unprintable":
        raise Unprintable
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(7)
    if response == "crash":
        os.kill(os.getpid(), 9)
    if response == "nan":
        return float("nan")
    if response == "inf":
        return 1e999, "x"
    if response == "none":
        return None
    if response == "text":
        return "1.0"
    if response == "triple":
        return 1.0, 2, 3
    if response == "print":
        print("garbage\\n" * 10000, flush=True)
        os.write(1, b'{"id": 0, "reward": 5}\\n')
        sys.stderr.write("noise")
        return 1.0
    if response == "recurse":
        return judge(response, item)
    if response == "close":
        os.closerange(0, 100)
        return 1.0
    if response == "object":
        return 1.0, object()
    if response == "deep":
        answer = []
        for _ in range(100000):
            answer = [answer]
        return 0.5, answer
    if response == "forge":
        for descriptor in range(3, 64):
            try:
                forged = b'{"id": 99, "reward": 5, "answer": 0, "problem": null, "message": ""}' + bytes([10])
                os.write(descriptor, forged)
            except OSError:
                pass
        return 1.0
    if response.startswith("child "):
        child = os.fork()
        if child == 0:
            time.sleep(300)
        with open(response[6:], "w") as out:
            out.write(str(child))
        time.sleep(1000)
    if response == "fork":
        if os.fork() == 0:
            os.setsid()
            time.sleep(8)
            os._exit(0)
        time.sleep(1000)
    return float(len(response)), response

def where(response, item, *, file):
    with open(file, "w") as out:
        out.write(str(os.getpid()))
    while True:
        pass

def stuck(response, item, *, file):
    with open(file, "w") as out:
        out.write(str(os.getpid()))
    import re
    return float(bool(re.match("^(a+)+$", "a" * 60 + "!")))

def loaded(response, item):
    return float(any(name in sys.modules for name in ("torch", "transformers", "numpy", "pydantic"))), None
"""

ITEM = Item(prompt="q", answer="a")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "mine.py"
    path.write_text(HOSTILE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def verifier(hostile: Path) -> Iterator[Verifier]:
    with Verifier(config(f"{hostile}:judge", timeout=2.0)) as made:
        yield made


def config(verifier: str, timeout: float = 10.0, workers: int = 2, **params: object) -> TaskConfig:
    reward = RewardConfig(verifier=verifier, params=params)
    return TaskConfig(source="reasoning_gym:chain_sum", rewards=[reward], timeout=timeout, workers=workers)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise", "raised KeyError: 'oops'"),
        ("unprintable", "raised Unprintable: (its text cannot be shown"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its worker process with exit status 7"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("none", "returned NoneType where a number is expected"),
        ("text", "returned str where a number is expected"),
        ("triple", "got 3 values"),
        ("recurse", "raised RecursionError"),
        ("close", "ended its worker process"),
    ],
)
def test_errors_cost_one_sample(verifier: Verifier, response: str, message: str) -> None:
    scores = verifier.score([ITEM] * 3, ["ok", response, "fine"])
    assert scores.rewards == [2.0, 0.0, 4.0]
    assert (scores.errors, scores.timeouts) == (1, 0)
    assert message in scores.messages[0]
    assert scores.answers == ["ok", None, "fine"]


@pytest.mark.skipif(os.name != "posix", reason="signals are named on POSIX only")
def test_a_crash_is_named(verifier: Verifier) -> None:
    scores = verifier.score([ITEM], ["crash"])
    assert (scores.rewards, scores.errors) == ([0.0], 1)
    assert "SIGKILL" in scores.messages[0]


@pytest.mark.parametrize("response", ["hang", "sleep"])
def test_hangs_are_killed(verifier: Verifier, response: str) -> None:
    start = time.monotonic()
    scores = verifier.score([ITEM] * 3, ["ok", response, "fine"])
    assert time.monotonic() - start < 6
    assert (scores.rewards, scores.errors, scores.timeouts) == ([2.0, 0.0, 4.0], 0, 1)
    assert "took over 2 s and was killed (reward 0 for 1 response)" in scores.messages[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_grandchild_that_keeps_the_pipe_does_not_block(verifier: Verifier) -> None:
    start = time.monotonic()
    scores = verifier.score([ITEM] * 2, ["fork", "ok"])
    assert time.monotonic() - start < 6
    assert (scores.rewards, scores.timeouts) == ([0.0, 2.0], 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_verifier_started_is_killed_with_it(verifier: Verifier, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert verifier.score([ITEM], [f"child {note}"]).timeouts == 1
    awaited(lambda: not lives(int(note.read_text())))


def test_a_forged_reply_is_not_believed(verifier: Verifier) -> None:
    scores = verifier.score([ITEM] * 3, ["ok", "forge", "fine"])
    assert (scores.rewards, scores.errors) == ([2.0, 0.0, 4.0], 1)
    assert "wrote nonsense" in scores.messages[0]


def test_printing_is_harmless(verifier: Verifier) -> None:
    scores = verifier.score([ITEM] * 2, ["print", "print"])
    assert (scores.rewards, scores.errors, scores.messages) == ([1.0, 1.0], 0, [])


def test_odd_answers_become_text(verifier: Verifier) -> None:
    scores = verifier.score([ITEM] * 2, ["object", "deep"])
    assert scores.rewards[0] == 1.0
    assert str(scores.answers[0]).startswith("<object object")
    assert scores.rewards[1] == 0.5
    assert scores.answers[1] == "(list that cannot be shown)"
    assert (scores.errors, scores.timeouts) == (0, 0)


def test_any_text_travels(verifier: Verifier) -> None:
    responses = ["a\nb\r\n\x00\u2028", "\U0001f600\u05d0", "\ud800", "", "x" * 3_000_000]
    scores = verifier.score([ITEM] * 5, responses)
    assert scores.rewards == [float(len(response)) for response in responses]
    assert scores.answers[:4] == responses[:4]
    assert (scores.errors, scores.timeouts) == (0, 0)


def test_an_item_that_is_not_json_is_an_error(verifier: Verifier) -> None:
    scores = verifier.score([Item(prompt="q", answer={1, 2}), ITEM], ["ok", "ok"])
    assert (scores.rewards, scores.errors) == ([0.0, 2.0], 1)
    assert "not JSON" in scores.messages[0]


def test_losing_every_worker_ends_the_call_not_the_run(verifier: Verifier) -> None:
    scores = verifier.score([ITEM] * 40, ["die"] * 40)
    assert (scores.rewards, scores.errors) == ([0.0] * 40, 40)
    assert any("workers in a row were lost" in message for message in scores.messages)
    assert verifier.score([ITEM], ["ok"]).rewards == [2.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def judge(response): return 1", "cannot be called as .response, item"),
        ("def judg(response, item): return 1", "did you mean 'judg'"),
        ("judge = 3", "is a int, not something callable"),
        ("import nonsense_that_is_not_there", "No module named 'nonsense_that_is_not_there'"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import os; os._exit(9)", "exit status 9 while it started"),
        ("import os, sys; sys.stderr.write('told you'); sys.stderr.flush(); os.abort()", "told you"),
    ],
)
def test_verifiers_that_cannot_be_loaded_are_refused_at_once(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(ValueError, match=message), Verifier(config(f"{path}:judge")):
        pass


def test_modules_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_rules.py").write_text("def f(r, i, *, bonus=0): return bonus", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Verifier(config("house_rules:f", bonus=2)) as made:
        assert made.score([ITEM], ["x"]).rewards == [2.0]
    with pytest.raises(ValueError, match="did you mean 'bonus'"), Verifier(config("house_rules:f", bonis=2)):
        pass


def test_workers_import_nothing_heavy(hostile: Path) -> None:
    with Verifier(config(f"{hostile}:loaded")) as made:
        assert made.score([ITEM], ["x"]).rewards == [0.0]


def test_a_catastrophic_pattern_is_killed() -> None:
    # The regular-expression engine never lets go of the interpreter: no thread or alarm could stop it.
    with Verifier(config("regex", timeout=1.0, pattern=r"^(a+)+$")) as made:
        scores = made.score([Item(prompt="q", answer="a")] * 2, ["a" * 60 + "!", "a"])
    assert (scores.rewards, scores.timeouts) == ([0.0, 1.0], 1)


def test_math_runs_where_alarms_do_not(hostile: Path) -> None:
    with Verifier(config("math", timeout=30.0)) as made:
        scores = made.score([Item(prompt="q", answer="1/2")] * 2, ["\\boxed{\\frac{1}{2}}", "2"])
    assert (scores.rewards, scores.correct, scores.errors) == ([1.0, 0.0], [True, False], 0)


ORPHAN = """
import json, sys
from tokenloom.tasks import Item, TaskConfig, Verifier
rewards = [json.loads(sys.argv[1])]
config = TaskConfig(source="reasoning_gym:chain_sum", rewards=rewards, timeout=float(sys.argv[2]))
with Verifier(config) as verifier:
    verifier.score([Item(prompt="q", answer="a")], ["a"])
"""


@pytest.mark.skipif(os.name != "posix", reason="asks whether a process lives as POSIX does")
@pytest.mark.parametrize(
    ("function", "timeout"),
    [
        ("where", 300),
        # In a C loop nothing of Python runs, so the watchdog ends it some seconds after the timeout.
        pytest.param("stuck", 3, marks=pytest.mark.slow),
    ],
)
def test_workers_die_with_their_parent(hostile: Path, tmp_path: Path, function: str, timeout: int) -> None:
    note = tmp_path / "pid"
    reward = json.dumps({"verifier": f"{hostile}:{function}", "params": {"file": str(note)}})
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, reward, str(timeout)])
    try:
        worker = int(awaited(lambda: note.exists() and note.read_text()))
        os.kill(worker, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        awaited(lambda: not lives(worker))
    finally:
        parent.kill()
        parent.wait()
