"""`RolloutConfig`: the recipe's `rollout:` section."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokenloom.batch import Sampling


class RolloutConfig(BaseModel):
    """How many prompts and responses a step has, and how the responses are drawn.

    Raises:
        pydantic.ValidationError: naming the key, the value and what is allowed (a ValueError).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts_per_step: int = Field(8, ge=1, description="Distinct prompts of one step.")
    group_size: int = Field(8, ge=1, description="Responses sampled for each prompt.")
    max_tokens: int = Field(16, ge=1, description="Longest response, in tokens; longer ones are cut off.")
    temperature: float = Field(1.0, description="Divides the logits; log-probs are taken at it too.")
    top_k: int = Field(0, ge=0, description="Sample from the k most probable tokens; 0: from all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the fewest tokens with this probability; 1: from all."
    )
    stop: tuple[str, ...] = Field((), description="Strings that end a response; they stay part of it.")
    max_turns: int = Field(default=8, ge=1, description="Most turns of an episode, for tasks with an environment.")
    total_tokens: int | None = Field(
        default=None, ge=1, description="Longest episode in tokens, tool output included; unset: the model's positions."
    )
    max_rows: int | None = Field(
        None, ge=1, description="Most responses decoded together, to bound memory; unset: all of a step."
    )

    speculate: int = Field(
        0,
        ge=0,
        description="Longest draft that a response checks in one step, guessed from what its group has written; "
        "samples stay the same. 0: no drafts. Pays in small batches of text that repeats itself.",
    )

    @field_validator("temperature")
    @classmethod
    def _explores(cls, value: float) -> float:
        if value == 0:
            raise ValueError(
                "temperature 0 is greedy: all responses of a group would be the same, every advantage "
                "zero, and nothing learned. Use a temperature above 0, such as 1.0 (evaluation sets its own)"
            )
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"temperature is {value}, must be finite and above 0, such as 1.0")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        # What has passed through here counts as Python data, where a strict tuple is not made of a list.
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("stop")
    @classmethod
    def _visible_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("stop contains an empty string, which every response contains; remove it")
        return value

    def sampling(self, seed: int | None = None) -> Sampling:
        """The parameters of one call of `generate`."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            stop=self.stop,
            seed=seed,
        )
