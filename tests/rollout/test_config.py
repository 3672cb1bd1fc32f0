"""The recipe's `rollout:` section."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tokenloom.batch import Sampling
from tokenloom.rollout import RolloutConfig


def test_sampling() -> None:
    config = RolloutConfig(max_tokens=9, temperature=0.7, top_k=4, top_p=0.5, stop=["\n", "STOP"])
    expected = Sampling(temperature=0.7, top_k=4, top_p=0.5, max_tokens=9, stop=("\n", "STOP"), seed=3)
    assert config.sampling(3) == expected
    assert RolloutConfig().sampling() == Sampling(max_tokens=16)
    assert RolloutConfig(stop="\n").stop == ("\n",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0}, "greedy.*nothing learned"),
        ({"temperature": -0.5}, r"temperature is -0\.5"),
        ({"temperature": float("inf")}, "finite"),
        ({"group_size": 0}, "greater than or equal to 1"),
        ({"prompts_per_step": 0}, "greater than or equal to 1"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_rows": 0}, "greater than or equal to 1"),
        ({"top_k": -1}, "greater than or equal to 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"groupsize": 8}, "groupsize"),
    ],
)
def test_mistakes_are_explained(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        RolloutConfig(**values)
