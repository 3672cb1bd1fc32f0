"""The example environment, and environments by import path."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tokenloom.tasks import Environment, Item, Observation, TaskConfig, load_task
from tokenloom.tasks.environments import environment_factory
from tokenloom.tasks.environments.calculator import CalculatorEnvironment, calculate

ITEM = Item(messages=({"role": "user", "content": "12 * 12 ="},), answer="144")


def test_an_episode() -> None:
    environment = CalculatorEnvironment()
    assert isinstance(environment, Environment)
    assert environment.reset(ITEM, seed=0) == Observation(messages=ITEM.messages)
    first = environment.step("Let me see: <calc>12*12</calc>")
    assert (first.observation, first.reward, first.done) == ("<result>144</result>", 0.0, False)
    last = environment.step("It is 144.")
    assert (last.observation, last.reward, last.done) == (None, 1.0, True)
    assert last.info == {"answer": "144", "correct": True, "calls": 1}
    environment.reset(ITEM, seed=0)
    assert environment.step("143").reward == 0.0


def test_calls_are_limited() -> None:
    environment = CalculatorEnvironment(max_calls=1)
    environment.reset(ITEM, seed=0)
    assert not environment.step("<calc>1</calc>").done
    assert environment.step("<calc>2</calc>").done


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="call reset"):
        CalculatorEnvironment().step("x")
    with pytest.raises(ValueError, match="did you mean 'number'"):
        CalculatorEnvironment(verifier="numbers")
    with pytest.raises(ValueError, match=r"cannot be made with \{'calls': 3\}"):
        environment_factory("calculator", {"calls": 3})
    with pytest.raises(ValueError, match="exactly one"):
        Observation()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3+4", "7"),
        (" (1 + 2) * -3 ", "-9"),
        ("7/2", "3.5"),
        ("0.1+0.2", "0.3"),
        ("1/3*3", "1"),
        ("2\u00d73\u22121\u00f71", "5"),
        ("1/0", "error: division by zero"),
        ("2**9", "error: only numbers, + - * / and parentheses"),
        ("9**9**9**9", "error: only numbers, + - * / and parentheses"),
        ("__import__('os').getpid()", "error: only numbers, + - * / and parentheses"),
        ("True + 1", "error: only numbers, + - * / and parentheses"),
        ("'a' * 3", "error: only numbers, + - * / and parentheses"),
        ("1 +", "error: not arithmetic"),
        ("", "error: not arithmetic"),
        ("(" * 400 + "1" + ")" * 400, "error: not arithmetic"),
        ("1e999", "error: number too large"),
        ("9" * 70, "error: number too large"),
        ("*".join(["999999"] * 60), "error: number too large"),
    ],
)
def test_calculate(expression: str, result: str) -> None:
    start = time.perf_counter()
    assert calculate(expression) == result
    assert time.perf_counter() - start < 1


MINE = """
from tokenloom.tasks import Observation, Step

class Echo:
    def __init__(self, word="hi"):
        self.word = word
    def reset(self, item, seed):
        return Observation(text=item.text)
    def step(self, response_text):
        return Step(observation=self.word, done=response_text == "stop")

class Half:
    def reset(self, item, seed):
        return None
"""


def test_environments_by_import_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    config = TaskConfig(
        source="reasoning_gym:chain_sum",
        size=4,
        environment=f"{path}:Echo",
        environment_params={"word": "yo"},
    )
    make = load_task(config).environment
    assert make is not None
    assert make() is not make()
    assert make().step("go").observation == "yo"
    with pytest.raises(ValueError, match="Half without `reset` and `step`"):
        environment_factory(f"{path}:Half", {})
