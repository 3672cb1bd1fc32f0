"""Responses that are scored as they come: workers begin at once, nobody waits for them, and all ends together.

What happens when is settled by files that a verifier writes and waits for, never by the clock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.processes import awaited, lives
from tokenloom.tasks import Item, RewardConfig, Scores, TaskConfig, Verifier

VERIFIERS = """
import os, sys, time
from pathlib import Path

HERE = Path(__file__).parent
if (HERE / "slow-import").exists():
    (HERE / "importing").write_text(str(os.getpid()))
    time.sleep(1000)

def waits(response, item):
    folder = Path(item.answer)
    (folder / f"at-{response}").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.01)
    return float(len(response)), response

def forks(response, item):
    child = os.fork()
    if child == 0:
        os.setsid()
        for _ in range(3000):
            if (Path(item.answer) / "go").exists():
                break
            time.sleep(0.01)
        (Path(item.answer) / "gone").touch()
        os._exit(0)
    (Path(item.answer) / "child").write_text(str(child))
    time.sleep(1000)

def judge(response, item, *, bonus=0):
    if response == "raise":
        raise KeyError(item.answer)
    if response == "nan":
        return float("nan")
    if response == "die":
        os._exit(7)
    if response == "hang":
        time.sleep(1000)
    return float(response == item.answer) + bonus, None if response == "blank" else response

def mortal(response, item):
    os._exit(5)
"""

# A reward in this process between two in workers.
MIXED = (("judge", {}), ("exact", {}), ("judge", {"bonus": 2}))


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed") / "mine.py"
    path.write_text(VERIFIERS, encoding="utf-8")
    return path


@pytest.fixture
def waits(verifiers: Path) -> Iterator[Verifier]:
    """Stays at a response until its item's folder holds `go`."""
    with Verifier(config(verifiers, ("waits", {}), timeout=30.0)) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def mixed(verifiers: Path) -> Iterator[Verifier]:
    with Verifier(config(verifiers, *MIXED)) as verifier:
        yield verifier


def config(file: Path, *rewards: tuple[str, dict[str, Any]], timeout: float = 60.0, workers: int = 2) -> TaskConfig:
    named = [
        RewardConfig(verifier=name if name == "exact" else f"{file}:{name}", params=params, weight=i + 1)
        for i, (name, params) in enumerate(rewards)
    ]
    return TaskConfig(source="x.jsonl", rewards=named, timeout=timeout, workers=workers)


def items_of(folder: Path, count: int) -> list[Item]:
    return [Item(prompt="q", answer=str(folder))] * count


def streamed(verifier: Verifier, items: list[Item], responses: list[str], order: list[int]) -> Scores:
    with verifier.stream(items) as stream:
        for row in order:
            stream.add(row, responses[row])
        assert stream.responses == responses
        return stream.scores()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tokenloom-verify")]


def written(path: Path) -> Callable[[], object]:
    return lambda: path.exists() and path.read_text()


# -- while others are still being written ----------------------------------------------------------


def test_a_response_is_scored_before_the_next_one_comes(waits: Verifier, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with waits.stream(items_of(tmp_path, 3)) as stream:
        for row, text in ((2, "ccc"), (0, "a"), (1, "bb")):
            stream.add(row, text)
            awaited(written(tmp_path / f"at-{text}"))
        scores = stream.scores()
    assert (scores.rewards, scores.answers) == ([1.0, 2.0, 3.0], ["a", "bb", "ccc"])
    assert threads() == []


def test_adding_never_waits_for_a_worker(verifiers: Path, tmp_path: Path) -> None:
    texts = [f"{i}" for i in range(300)]
    with Verifier(config(verifiers, ("waits", {}), workers=1)) as verifier:
        with verifier.stream(items_of(tmp_path, 300)) as stream:
            for row, text in enumerate(texts):
                stream.add(row, text)
            awaited(written(tmp_path / "at-0"))
            assert not (tmp_path / "at-1").exists()  # the one worker is still at the first
            (tmp_path / "go").touch()
            scores = stream.scores()
        assert scores == verifier.score(items_of(tmp_path, 300), texts)
    assert (scores.answers, scores.errors, scores.timeouts) == (texts, 0, 0)


# -- the same scores -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_gives_the_scores_of_the_batch(mixed: Verifier, data: st.DataObject) -> None:
    responses = data.draw(st.lists(st.sampled_from(["a", "b", "", "blank", "raise", "nan", "\ud800"]), max_size=12))
    items = [Item(prompt="q", answer=data.draw(st.sampled_from(["a", "b", None]))) for _ in responses]
    order = data.draw(st.permutations(range(len(responses))))
    assert streamed(mixed, items, responses, order) == mixed.score(items, responses)


def test_verifiers_without_a_process_give_the_scores_of_the_batch(verifiers: Path) -> None:
    items = [Item(prompt="q", answer="a"), Item(prompt="q", answer="b")]
    with Verifier(config(verifiers, ("exact", {}), ("exact", {"case_sensitive": False}))) as verifier:
        assert streamed(verifier, items, ["A", "b"], [1, 0]) == verifier.score(items, ["A", "b"])
        assert verifier.score(items, ["A", "b"]).rewards == [2.0, 3.0]
        assert streamed(verifier, [], [], []) == verifier.score([], [])


def test_losses_and_timeouts_are_those_of_the_batch(verifiers: Path) -> None:
    responses = ["a", "die", "hang", "a", "raise", "die", "b"]
    items = [Item(prompt="q", answer="a")] * len(responses)
    with Verifier(config(verifiers, *MIXED, timeout=2.0)) as verifier:
        scores = streamed(verifier, items, responses, [5, 2, 0, 6, 4, 1, 3])
        assert scores == verifier.score(items, responses)
    # 1 * judge + 2 * exact + 3 * (judge + 2).
    assert scores.rewards == [12.0, 0.0, 0.0, 12.0, 0.0, 0.0, 6.0]
    assert (scores.errors, scores.timeouts) == (6, 2)


def test_a_verifier_that_loses_all_workers_leaves_the_others_theirs(verifiers: Path) -> None:
    items = [Item(prompt="q", answer="a")] * 20
    with Verifier(config(verifiers, ("mortal", {}), ("judge", {}))) as verifier:
        scores = streamed(verifier, items, ["a"] * 20, list(range(20)))
    lost, judged = scores.components.values()
    assert (lost, judged) == ([0.0] * 20, [1.0] * 20)
    assert any("16 workers in a row were lost before it" in message for message in scores.messages)


def test_one_reward_may_be_given_twice(verifiers: Path) -> None:
    reward = RewardConfig(verifier=f"{verifiers}:judge", params={"bonus": 1})
    with Verifier(TaskConfig(source="x.jsonl", rewards=[reward, reward])) as verifier:
        assert verifier.score([Item(prompt="q", answer="a")] * 2, ["a", "b"]).rewards == [4.0, 2.0]


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_ends_workers_and_threads_at_once(
    waits: Verifier, tmp_path: Path, kind: type[BaseException]
) -> None:
    items = items_of(tmp_path, 4)
    with pytest.raises(kind, match="while decoding"), waits.stream(items) as stream:  # noqa: PT012  # the block is what raises
        for row in range(4):
            stream.add(row, str(row))
        workers = [int(awaited(written(tmp_path / f"at-{row}"))) for row in (0, 1)]
        assert all(map(lives, workers))
        raised = time.monotonic()
        raise kind("while decoding")
    assert time.monotonic() - raised < 15  # a worker may stay at a response for 30 s
    assert threads() == []
    assert not any(map(lives, workers))
    (tmp_path / "go").touch()
    assert waits.score(items, ["abc"] * 4).rewards == [3.0] * 4


def test_a_worker_that_is_only_starting_is_ended_too(verifiers: Path, tmp_path: Path) -> None:
    gate = verifiers.with_name("slow-import")
    with Verifier(config(verifiers, ("waits", {}))) as verifier:
        gate.touch()
        try:
            with pytest.raises(RuntimeError), verifier.stream(items_of(tmp_path, 2)) as stream:  # noqa: PT012  # as above
                stream.add(0, "a")
                stream.add(1, "b")
                starting = int(awaited(written(verifiers.with_name("importing"))))
                raised = time.monotonic()
                raise RuntimeError
        finally:
            gate.unlink()
        assert time.monotonic() - raised < 15  # it may take 60 s to start
        assert threads() == []
        assert not lives(starting)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_grandchild_that_keeps_the_pipe_delays_no_end(verifiers: Path, tmp_path: Path) -> None:
    with Verifier(config(verifiers, ("forks", {}), workers=1)) as verifier:
        try:
            with pytest.raises(RuntimeError), verifier.stream(items_of(tmp_path, 1)) as stream:  # noqa: PT012  # as above
                stream.add(0, "a")
                child = int(awaited(written(tmp_path / "child")))
                raise RuntimeError
            assert threads() == []
            assert not (tmp_path / "gone").exists()
        finally:
            (tmp_path / "go").touch()
        awaited(lambda: not lives(child))


def test_scores_that_nobody_asks_for_are_given_up(waits: Verifier, tmp_path: Path) -> None:
    with waits.stream(items_of(tmp_path, 1)) as stream:
        stream.add(0, "a")
        worker = int(awaited(written(tmp_path / "at-a")))
    assert threads() == []
    assert not lives(worker)


def test_closing_the_verifier_leaves_nobody_waiting(waits: Verifier, tmp_path: Path) -> None:
    with waits.stream(items_of(tmp_path, 5)) as stream:
        for row in range(5):
            stream.add(row, str(row))
        awaited(written(tmp_path / "at-1"))
        waits.close()
        scores = stream.scores()
    assert (scores.rewards, scores.errors) == ([0.0] * 5, 5)
    assert any("the workers were ended before it" in message for message in scores.messages)
    assert threads() == []


# -- mistakes --------------------------------------------------------------------------------------


def test_workers_serve_one_stream_at_a_time(waits: Verifier, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with waits.stream(items_of(tmp_path, 1)) as stream:
        stream.add(0, "a")
        with pytest.raises(RuntimeError, match="scoring another batch"):
            waits.score(items_of(tmp_path, 1), ["b"])
        assert stream.scores().rewards == [1.0]
    assert waits.score(items_of(tmp_path, 1), ["bb"]).rewards == [2.0]


def test_rows_are_added_once_and_all_of_them(mixed: Verifier) -> None:
    items = [Item(prompt="q", answer="a")] * 2
    with mixed.stream(items) as stream:
        stream.add(1, "a")
        with pytest.raises(ValueError, match="row 1 has a response already"):
            stream.add(1, "a")
        with pytest.raises(ValueError, match="row 2 is none of the 2 items"):
            stream.add(2, "a")
        with pytest.raises(ValueError, match="1 of 2 items have no response"):
            stream.scores()
        stream.add(0, "b")
        assert stream.scores().correct == [False, True]
