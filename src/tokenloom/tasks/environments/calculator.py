"""`calculator`: the model may write `<calc>3+4</calc>` and is told the result."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TypeGuard

from tokenloom.tasks.environment import Observation, Step
from tokenloom.tasks.item import Item
from tokenloom.tasks.names import unknown
from tokenloom.tasks.outcome import call
from tokenloom.tasks.verifiers import IN_PROCESS, load

_CALL = re.compile(r"<calc>([^<]{0,500})</calc>")
_OPERATIONS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00f7": "/"})
_LARGEST = 10**60


class CalculatorEnvironment:
    """Arithmetic on demand; the turn without a call holds the final answer, which is scored.

    Only the last call of a turn is answered, as `<result>7</result>`: put `</calc>` among the stop
    strings of the rollout, so that a turn ends with its call. After `max_calls` calls the next turn
    ends the episode.

    Args:
        verifier: how the final turn is scored; one of the built-ins that cannot hang.
        max_calls: answered calls per episode.

    Raises:
        ValueError: for another verifier or a negative count.
    """

    def __init__(self, *, verifier: str = "number", max_calls: int = 4) -> None:
        if verifier not in IN_PROCESS:
            raise ValueError(unknown("verifier of the calculator", verifier, IN_PROCESS))
        if max_calls < 0:
            raise ValueError(f"max_calls must be at least 0, got {max_calls}")
        self._verify = load(verifier)
        self._max_calls = max_calls
        self._item: Item | None = None
        self._calls = 0

    def reset(self, item: Item, seed: int) -> Observation:
        """Shows the item's own prompt; `seed` changes nothing."""
        self._item, self._calls = item, 0
        return Observation(messages=item.messages, text=item.prompt)

    def step(self, response_text: str) -> Step:
        """Answers a call, or scores the final turn.

        Raises:
            ValueError: before `reset`.
        """
        if self._item is None:
            raise ValueError("call reset(item, seed) before step")
        calls = _CALL.findall(response_text)
        if calls and self._calls < self._max_calls:
            self._calls += 1
            return Step(observation=f"<result>{calculate(calls[-1])}</result>")
        scored = call(self._verify, response_text, self._item, {})
        info = {"answer": scored.answer, "correct": scored.reward >= 1, "calls": self._calls}
        if scored.problem is not None:
            info["problem"] = scored.message
        return Step(reward=scored.reward, done=True, info=info)


def calculate(expression: str) -> str:
    """The value of `+ - * /` and parentheses over decimal numbers, exactly; or `error: why`.

    Parsed, never evaluated as Python; numbers beyond 60 digits are an error, so time is bounded.
    """
    try:
        tree = ast.parse(expression.strip().translate(_SIGNS), mode="eval")
        value = _value(tree.body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"error: {error}" if type(error) is ValueError else "error: not arithmetic"
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and _is_number(node.value):
        if not math.isfinite(node.value):
            raise ValueError("number too large")
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _bounded(_OPERATIONS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("only numbers, + - * / and parentheses")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bounded(value: Fraction) -> Fraction:
    if abs(value.numerator) > _LARGEST or value.denominator > _LARGEST:
        raise ValueError("number too large")
    return value
