"""One call of one verifier, with everything that it may do wrong turned into data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenloom.tasks.item import Item

VerifierFunction = Callable[..., Any]
Problem = Literal["error", "timeout"]

_LONGEST_ANSWER = 10_000
_LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Outcome:
    """The reward and the parsed answer, or a zero and what went wrong."""

    reward: float = 0.0
    answer: Any = None
    problem: Problem | None = None
    message: str = ""


def call(verifier: VerifierFunction, response: str, item: Item, params: Mapping[str, Any]) -> Outcome:
    """`verifier(response, item, **params)` as an outcome; exceptions and bad results become errors."""
    try:
        return _checked(verifier(response, item, **params))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a verifier that calls exit() costs only its sample
        return Outcome(problem="error", message=f"raised {describe(error)}")


def describe(error: BaseException) -> str:
    """Type and text of an exception, bounded, even when its `__str__` fails."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be shown)"
    return f"{type(error).__name__}: {text}"[:_LONGEST_MESSAGE]


def _checked(result: Any) -> Outcome:
    answer = None
    reward = result
    if isinstance(result, tuple | list):
        if len(result) != 2:
            raise ValueError(f"expected a number or (number, answer), got {len(result)} values")
        reward, answer = result
    if reward is None or isinstance(reward, str | bytes) or not hasattr(reward, "__float__"):
        return Outcome(problem="error", message=f"returned {type(reward).__name__} where a number is expected")
    value = float(reward)
    if not math.isfinite(value):
        return Outcome(problem="error", message=f"returned {value}, which is not a finite number")
    return Outcome(value, _plain(answer))


def _plain(answer: Any) -> Any:
    """The answer if it is JSON of moderate size, else its text."""
    if isinstance(answer, str):
        return answer[:_LONGEST_ANSWER]
    if answer is None or isinstance(answer, bool | int | float):
        # Whole numbers beyond the interpreter's digit limit cannot be written as JSON.
        return answer if not isinstance(answer, int) or answer.bit_length() < 4096 else hex(answer)[:_LONGEST_ANSWER]
    try:
        written = json.dumps(answer)
    except (TypeError, ValueError, RecursionError):
        try:
            return str(answer)[:_LONGEST_ANSWER]
        except Exception:
            return f"({type(answer).__name__} that cannot be shown)"
    return json.loads(written) if len(written) <= _LONGEST_ANSWER else written[:_LONGEST_ANSWER]
