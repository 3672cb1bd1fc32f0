"""Responses go to the verifiers while others still decode, and nothing but the time is different for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.processes import awaited, lives
from tokenloom.batch import Sampling
from tokenloom.policy import Policy
from tokenloom.rollout import generate
from tokenloom.tasks import Item, RewardConfig, TaskConfig, Verifier
from tokenloom.tasks.verify import ScoreStream
from tokenloom.train.respond import Responder
from train.setups import Tiny, lines, same_results, train

VERIFIERS = """
import os, time
from pathlib import Path

def noted(response, item):
    with open(item.answer, "a") as seen:
        seen.write(f"{os.getpid()}\\n")
    return len(response) / 8, response

def stuck(response, item):
    noted(response, item)
    time.sleep(1000)

def odd(response, item):
    if len(response) % 3 == 2:
        raise ValueError(f"{len(response)} characters")
    return float(response.count("1")), response[:1]
"""


@pytest.fixture(scope="module")
def policy(tiny: Tiny) -> Policy:
    return Policy.load(str(tiny.model))


@pytest.fixture
def verifiers(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(VERIFIERS, encoding="utf-8")
    return path


def config(verifiers: Path, name: str, workers: int = 1) -> TaskConfig:
    rewards = [RewardConfig(verifier=f"{verifiers}:{name}")]
    return TaskConfig(source="x.jsonl", rewards=rewards, workers=workers, timeout=60.0)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("max_rows", [None, 4])
def test_what_has_ended_is_verified_while_the_rest_decodes(
    policy: Policy, verifiers: Path, tmp_path: Path, max_rows: int | None
) -> None:
    """Decoding stands still after each step until the verifier has seen every response that has ended by then."""
    seen = tmp_path / "seen"
    items = [Item(prompt=text, answer=str(seen)) for text in ("1+2=", "3+0=")]
    verified: list[int] = []

    def report(finished: int, rows: int, tokens: int) -> None:
        awaited(lambda: not finished or (seen.exists() and len(seen.read_text().split()) == finished))
        verified.append(finished)

    sampling = Sampling(max_tokens=12)
    with Verifier(config(verifiers, "noted")) as verifier:
        answered = Responder(policy, verifier, max_rows=max_rows).respond(
            items, sampling, copies=6, generator=seeded(), report=report
        )
        batch = verifier.score([items[int(g)] for g in answered.rollouts.group_ids], answered.texts)
    assert len([n for n in set(verified) if 0 < n < 12]) >= 3  # several waited for something while others decoded
    assert verified[-1] == 12
    alone = generate(
        policy, [policy.encode_prompt(i.prompt or "") for i in items], sampling, copies=6, generator=seeded(),
        max_rows=max_rows,
    )  # fmt: skip
    assert torch.equal(answered.rollouts.tokens, alone.tokens)
    assert answered.rollouts.rewards is not None
    assert answered.rollouts.rewards.tolist() == pytest.approx(batch.rewards)
    assert len(set(batch.rewards)) > 2
    assert answered.rollouts.answers == tuple(answered.texts)


def test_continuations_are_verified_with_what_they_continue(policy: Policy, verifiers: Path, tmp_path: Path) -> None:
    items = [Item(prompt="1+2=", answer=str(tmp_path / "seen")), Item(prompt="3=", answer=str(tmp_path / "seen"))]
    prompts = [policy.encode_prompt(item.prompt or "") for item in items]
    begun = [torch.tensor([4, 5, 6]), torch.tensor([7])]
    prefixes = [torch.cat(pair) for pair in zip(prompts, begun, strict=True)]
    with Verifier(config(verifiers, "noted")) as verifier:
        rollouts = Responder(policy, verifier).continue_from(
            items, [len(p) for p in prompts], prefixes, Sampling(max_tokens=5), counts=[1, 2], generator=seeded()
        )
    whole = [
        policy.tokenizer.decode([*begun[g].tolist(), *rollouts.response(i).tolist()], skip_special_tokens=True)
        for i, g in enumerate(rollouts.group_ids.tolist())
    ]
    assert rollouts.group_ids.tolist() == [0, 1, 1]
    assert rollouts.rewards is not None
    assert rollouts.rewards.tolist() == [len(text) / 8 for text in whole]


@pytest.mark.parametrize("kind", [FloatingPointError, KeyboardInterrupt])
def test_trouble_while_decoding_leaves_no_process(
    policy: Policy, verifiers: Path, tmp_path: Path, kind: type[BaseException]
) -> None:
    seen = tmp_path / "seen"
    items = [Item(prompt="1+2=", answer=str(seen))]

    def report(finished: int, rows: int, tokens: int) -> None:
        if finished:
            assert finished < rows
            awaited(lambda: seen.exists() and len(seen.read_text().split()) == min(finished, 2))
            raise kind("not numbers")

    with Verifier(config(verifiers, "stuck", workers=2)) as verifier:
        with pytest.raises(kind, match="not numbers"):
            Responder(policy, verifier).respond(
                items, Sampling(max_tokens=12), copies=8, generator=seeded(), report=report
            )
        assert not any(lives(int(pid)) for pid in seen.read_text().split())
        assert not [t for t in threading.enumerate() if t.name.startswith("tokenloom-verify")]


def test_a_run_is_the_one_that_scores_batches(
    tiny: Tiny, verifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte the same files and bit for bit the same weights, with a verifier that raises now and then."""
    recipe = tiny.recipe(task={"rewards": [{"verifier": f"{verifiers}:odd"}], "workers": 2}, rollout={"max_tokens": 6})
    train(recipe, tmp_path / "streamed")

    @contextmanager
    def afterwards(self: Verifier, items: Any) -> Iterator[ScoreStream]:
        yield ScoreStream(self, items, None)

    monkeypatch.setattr(Verifier, "stream", afterwards)
    train(recipe, tmp_path / "batch")
    same_results(tmp_path / "streamed", tmp_path / "batch")
    assert any(line.get("verifier_errors") for line in lines(tmp_path / "streamed"))
    assert any(line.get("reward") for line in lines(tmp_path / "streamed"))
