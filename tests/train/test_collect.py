"""Collecting a step's batch: refilling, its cap, what the first round measured, and what nobody kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenloom.tasks import Item, Task, Verifier
from tokenloom.tasks.verify import Scores
from tokenloom.train.collect import Collector
from tokenloom.train.data import PromptStream
from tokenloom.train.respond import Responder
from tokenloom.train.session import Session
from train.setups import EVAL, Tiny, lines


class Scripted(Verifier):
    """Scores the i-th call with the i-th list: a number for every group, or None for a mixed group."""

    def __init__(self, script: list[list[float | None]], group: int) -> None:
        self.script, self.group, self.calls = script, group, 0

    def score(self, items: Any, responses: Any) -> Scores:
        outcomes: list[float] = []
        for value in self.script[self.calls]:
            outcomes += [float(i % 2) for i in range(self.group)] if value is None else [value] * self.group
        self.calls += 1
        assert len(outcomes) == len(items) == len(responses)
        right = [r == 1.0 for r in outcomes]
        return Scores(outcomes, {"scripted": outcomes}, [None] * len(outcomes), right, 1, 1, [f"call {self.calls}"])


@pytest.fixture
def session(tiny: Tiny, tmp_path: Path) -> Any:
    training = {"steps": 3, "max_sampling_rounds": 3, "learning_rate": 0.01, "eval": EVAL}
    with Session(tiny.recipe(algorithm="dapo", train=training), tmp_path, []) as session:
        yield session


def collector(session: Session, script: list[list[float | None]]) -> Collector:
    trainer = session.trainer
    responder = Responder(trainer.policy, Scripted(script, 4))
    return Collector(trainer.recipe, responder, PromptStream(trainer.task, 0))


def test_it_samples_until_the_batch_is_full(session: Session) -> None:
    made = collector(session, [[None, 1.0, 0.0], [0.0, None, None], [None, None, None]])
    got = made.collect(session.trainer.algorithm, 0)
    assert made.responder.verifier.calls == 2  # type: ignore[attr-defined]  # ours
    assert got.rounds == 2
    assert got.sampled_groups == 6
    assert got.rollouts.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # Of the first round alone, in which 2 + 4 + 0 of 12 were right.
    assert got.first_accuracy == 0.5
    assert got.first_reward == 0.5
    assert got.errors == 4
    assert got.messages == ["call 1", "call 2"]
    stream = PromptStream(session.trainer.task, 0)
    first, second = stream.draw(3, 0.0), stream.draw(3, 0.0)
    kept = [first[0], second[1], second[2]]
    assert got.items == [item for item in kept for _ in range(4)]
    assert got.rollouts.policy_version is not None
    assert got.rollouts.policy_version.tolist() == [0] * 12
    for row, item in enumerate(got.items):
        expected = session.trainer.policy.encode_prompt(item.messages or "")
        assert torch.equal(got.rollouts.prompt_tokens[row], expected)
    assert len(got.texts) == 12


def test_surplus_groups_are_left_out(session: Session) -> None:
    got = collector(session, [[1.0, None, None], [None, None, None]]).collect(session.trainer.algorithm, 0)
    assert len(got.rollouts) == 12
    stream = PromptStream(session.trainer.task, 0)
    first, second = stream.draw(3, 0.0), stream.draw(3, 0.0)
    assert got.items[::4] == [first[1], first[2], second[0]]


def test_the_number_of_rounds_is_capped(session: Session) -> None:
    got = collector(session, [[0.0, None, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).collect(session.trainer.algorithm, 0)
    assert got.rounds == 3
    assert got.sampled_groups == 9
    assert got.rollouts.group_ids.tolist() == [0] * 4


def test_when_nothing_is_kept_the_step_is_measured_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    training = {"steps": 2, "max_sampling_rounds": 2, "learning_rate": 0.01, "eval": EVAL}
    recipe = tiny.recipe(algorithm="dapo", train=training, log={"tokens_every": 1})
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        trainer.step(0)  # so that AdamW has momentum that could move something
        trainer.collector.responder = Responder(trainer.policy, Scripted([[1.0, 0.0, 0.0], [0.0] * 3], 4))
        before = {n: p.detach().clone() for n, p in trainer.policy.trainable_parameters()}
        trainer.step(1)
        assert all(torch.equal(p, before[n]) for n, p in trainer.policy.trainable_parameters())
    line = lines(tmp_path)[1]
    assert line["accuracy"] == pytest.approx(1 / 3, abs=1e-5)
    assert line["plan/kept"] == 0
    assert line["loss"] == 0
    assert line["grad_norm"] == 0
    assert line["sampling/rounds"] == 2
    assert "skipped_updates" not in line


def test_other_algorithms_sample_once(tiny: Tiny, tmp_path: Path) -> None:
    with Session(tiny.recipe(), tmp_path, []) as session:
        got = collector(session, [[0.0, 0.0, 0.0]]).collect(session.trainer.algorithm, 0)
    assert got.rounds == 1
    assert len(got.rollouts) == 12


def test_fewer_groups_than_mini_batches_do_no_harm(tiny: Tiny, tmp_path: Path) -> None:
    algorithm = {"preset": "dapo", "updates": {"mini_batches": 3}}
    recipe = tiny.recipe(algorithm=algorithm, train={"max_sampling_rounds": 1, "eval": EVAL})
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        trainer.collector.responder = Responder(trainer.policy, Scripted([[None, 0.0, 0.0]], 4))
        trainer.step(0)
    (line,) = lines(tmp_path)
    assert line["grad_norm"] > 0


STATEFUL = '''
"""Keeps a group when its mean beats that of the previous step."""

from tokenloom import part


@part("beats-the-last", stage="select", scope="batch", paper="none", refill=True)
def beats_the_last(outcomes, state):
    last = 0.0 if state is None else state["mean"]
    return outcomes >= last, {"mean": float(outcomes.mean())}
'''


def test_a_stateful_selection_reads_the_state_of_the_step_before(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text(STATEFUL, encoding="utf-8")
    algorithm = {"preset": "grpo", "select": [f"{file}:beats_the_last"]}
    recipe = tiny.recipe(algorithm=algorithm, train={"max_sampling_rounds": 1, "steps": 3, "eval": EVAL})
    with Session(recipe, tmp_path / "run", []) as session:
        trainer = session.trainer
        script: list[list[float | None]] = [[0.5, 0.5, 0.5], [0.0, 1.0, 0.0]]
        trainer.collector.responder = Responder(trainer.policy, Scripted(script, 4))
        trainer.step(0)
        trainer.step(1)
        assert next(iter(trainer.state.values())) == {"mean": 1.0}
        trainer.done = 2
        trainer.save_checkpoint()
    kept = [line["sampling/groups"] for line in lines(tmp_path / "run")]
    assert kept == [3, 3]
    with Session(recipe, tmp_path / "run", [], resume=True) as session:
        assert next(iter(session.trainer.state.values())) == {"mean": 1.0}


def test_items_and_verifiers_meet_by_row(session: Session) -> None:
    """Every response is scored as an answer to its own prompt."""
    seen: list[tuple[Item, str]] = []

    class Spy(Scripted):
        def score(self, items: Any, responses: Any) -> Scores:
            seen.extend(zip(items, responses, strict=True))
            return super().score(items, responses)

    made = collector(session, [])
    made.responder.verifier = Spy([[None, None, None]], 4)
    got = made.collect(session.trainer.algorithm, 0)
    assert [item for item, _ in seen] == got.items
    assert [text for _, text in seen] == got.texts
    task: Task = session.trainer.task
    assert {item.key for item in got.items} <= {item.key for item in task.train}
