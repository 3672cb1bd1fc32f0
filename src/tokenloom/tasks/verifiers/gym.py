"""`reasoning_gym`: the scorer of the data set that the item came from.

Runs in a worker process: some scorers evaluate expressions or search.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from tokenloom.tasks.item import Item
from tokenloom.tasks.sources.encoding import decode
from tokenloom.tasks.verifiers.number import last_number

EXTRACT = ("tag", "response", "last_line", "number")

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def verify(response: str, item: Item, *, extract: str = "tag") -> tuple[float, str | None]:
    """The data set's score of the extracted answer; partial credit as the data set gives it.

    `extract`: `tag` (inside the last `<answer>…</answer>`, else the whole response), `response`,
    `last_line` (the last line that is not blank), `number` (the last number).

    Raises:
        ValueError: when the item does not come from reasoning-gym.
    """
    name, entry = item.metadata.get("dataset"), item.metadata.get("entry")
    if name is None or entry is None:
        raise ValueError("verifier 'reasoning_gym' needs items of a `reasoning_gym:` source")
    answer = extracted(response, extract)
    scorer = _scorer(str(name), json.dumps(item.metadata.get("params", {}), sort_keys=True))
    return float(scorer.score_answer(answer, decode(entry))), answer


def prepare() -> None:
    """Imports reasoning-gym, which takes seconds.

    Raises:
        ValueError: when it is not installed.
    """
    from tokenloom.tasks.sources.gym import datasets

    datasets()


def extracted(response: str, extract: str) -> str | None:
    """The part of a response that is scored, None if it has none."""
    if extract == "number":
        return last_number(response)
    if extract == "last_line":
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        return lines[-1] if lines else None
    tagged = _TAGGED.findall(response) if extract == "tag" else []
    return str(tagged[-1] if tagged else response).strip()


@lru_cache(maxsize=16)
def _scorer(name: str, params: str) -> Any:
    from tokenloom.tasks.sources.gym import build

    return build(name, json.loads(params), seed=0, size=1)
