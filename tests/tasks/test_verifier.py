"""Several rewards, weighted and added; what runs in this process and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenloom.tasks import Item, RewardConfig, TaskConfig, Verifier
from tokenloom.tasks.process import WorkerProcess


def test_rewards_are_weighted_and_added(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(r, i, *, unit): return len(r) / unit", encoding="utf-8")
    rewards = [
        RewardConfig(verifier="number"),
        RewardConfig(verifier=f"{tmp_path / 'mine.py'}:f", weight=-0.5, params={"unit": 4}),
        RewardConfig(verifier="number", weight=2, params={"tolerance": 1}),
    ]
    with Verifier(TaskConfig(source="x.jsonl", rewards=rewards)) as verifier:
        scores = verifier.score([Item(prompt="q", answer=7)] * 3, ["is 7", "is 8", "none"])
    names = list(scores.components)
    assert (names[0], names[2]) == ("number", "number#2")
    assert scores.components["number"] == [1.0, 0.0, 0.0]
    assert scores.components[names[1]] == [1.0, 1.0, 1.0]
    assert scores.components["number#2"] == [1.0, 1.0, 0.0]
    assert scores.rewards == [2.5, 1.5, -0.5]
    assert scores.correct == [True, False, False]
    assert scores.answers == ["7", "8", None]


def test_verifiers_that_cannot_hang_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(WorkerProcess, "__init__", refuse)
    rewards = [RewardConfig(verifier=name) for name in ("number", "exact", "choice")]
    with Verifier(TaskConfig(source="x.jsonl", rewards=rewards)) as verifier:
        scores = verifier.score([Item(prompt="q", answer="A 1")], ["A 1"])
    assert scores.rewards == [3.0]


def test_an_answer_that_cannot_be_compared_is_a_counted_zero(caplog: pytest.LogCaptureFixture) -> None:
    with Verifier(TaskConfig(source="x.jsonl", rewards=[RewardConfig(verifier="number")])) as verifier:
        scores = verifier.score([Item(prompt="q", answer="three")] * 2 + [Item(prompt="q", answer=3)], ["3"] * 3)
    assert (scores.rewards, scores.errors) == ([0.0, 0.0, 1.0], 2)
    assert "holds no number (reward 0 for 2 responses)" in scores.messages[0]
    assert scores.messages[0] in caplog.text


def test_empty_and_unequal_batches() -> None:
    with Verifier(TaskConfig(source="x.jsonl")) as verifier:
        scores = verifier.score([], [])
        assert (scores.rewards, scores.components, scores.correct) == ([], {"exact": []}, [])
        with pytest.raises(ValueError, match="1 items and 2 responses"):
            verifier.score([Item(prompt="q")], ["a", "b"])


def test_a_closed_verifier_starts_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(r, i): return 1", encoding="utf-8")
    verifier = Verifier(TaskConfig(source="x.jsonl", rewards=[RewardConfig(verifier=f"{tmp_path / 'mine.py'}:f")]))
    for _ in range(2):
        with verifier:
            assert verifier.score([Item(prompt="q")], ["a"]).rewards == [1.0]
    assert verifier.score([Item(prompt="q")], ["a"]).rewards == [1.0]
    verifier.close()
    verifier.close()
