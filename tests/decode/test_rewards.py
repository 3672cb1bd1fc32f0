"""Rewards: texts or ids, told apart by what they take."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.decode.table_runs import table_run
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.segment_search import Hypothesis
from tokenloom.decode.table import TableLM


class Letters:
    """Id i is the i-th letter."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join("abc"[i] for i in ids)


RUN = table_run(TableLM.random(3), [(0, 1), (2,)])
HYPOTHESES = [Hypothesis(0, (2, 2)), Hypothesis(1, ()), Hypothesis(1, (0,))]


def test_texts_are_prompt_and_response_together() -> None:
    seen: list[list[str]] = []

    def score(texts: list[str]) -> list[int]:
        seen.append(texts)
        return [len(t) for t in texts]

    assert reward_of("m", score, Letters())(RUN, HYPOTHESES) == [4.0, 1.0, 2.0]
    assert seen == [["abcc", "c", "ca"]]
    assert reward_of("m", lambda texts, scale=2: [scale] * len(texts), Letters())(RUN, HYPOTHESES[:1]) == [2.0]
    assert reward_of("m", score, Letters())(RUN, []) == []


def test_ids_come_one_response_at_a_time() -> None:
    def score(prompt_ids: list[int], ids: list[int]) -> float:
        return 10 * len(prompt_ids) + len(ids)

    class Model:
        def __call__(self, prompt_ids: list[int], ids: list[int]) -> float:
            return score(prompt_ids, ids)

    for reward in (score, Model(), functools.partial(score)):
        assert reward_of("m", reward)(RUN, HYPOTHESES) == [22.0, 10.0, 11.0]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="m: a reward is a function"):
        reward_of("m", 3.0)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        reward_of("m", lambda texts: [])
    for wrong in (lambda: 0.0, lambda a, b, c: 0.0):
        with pytest.raises(ValueError, match="takes texts, or prompt_ids and ids"):
            reward_of("m", wrong, Letters())
    with pytest.raises(ValueError, match="must be as many numbers"):
        reward_of("m", lambda texts: [1.0], Letters())(RUN, HYPOTHESES)
    with pytest.raises(ValueError, match="must be as many numbers"):
        reward_of("m", lambda prompt_ids, ids: float("nan"))(RUN, HYPOTHESES)
