"""`ModelConfig`: the recipe's `model:` section."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class LoraSection(BaseModel):
    """Low-rank adapters (arXiv:2106.09685) through PEFT: they alone train, the base is the reference."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=16, ge=1, description="Rank of the update matrices.")
    alpha: float | None = Field(
        default=None, gt=0, description="The update is scaled by alpha / rank; 2 * rank if unset."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapters; must be 0 (see below).")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description='"all-linear" (every linear layer but the head) or names of modules.',
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(
                f"lora.dropout is {value}, must be 0: with dropout the log-probs of training and of sampling "
                "disagree, and the importance ratio is no longer 1 on policy. Remove the key"
            )
        return value

    @property
    def scaling_alpha(self) -> float:
        """The numerator of the adapter's scale, with the default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class ValueHeadSection(BaseModel):
    """A scalar critic on the policy's last hidden state."""

    model_config = ConfigDict(extra="forbid")

    detach: bool = Field(
        default=False, description="Cut the gradient into the trunk: the value loss trains the head only."
    )


class ModelConfig(BaseModel):
    """Which model is trained, in which number format, and how much goes through it at once.

    `chunk_rows` counts response tokens whose [chunk, V] logits exist at once; `token_budget` counts
    padded tokens of one forward call. Both are memory settings: results do not depend on them
    beyond rounding. 0 lets the device decide.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="A built-in name, a Hugging Face Hub name or a local folder.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Format of the weights. float32 keeps small updates that bfloat16 rounds away.",
    )
    autocast: Literal["none", "bf16"] = Field(default="none", description="Format of the matrix products in the trunk.")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        default="auto",
        description="Attention code; eager wherever a model has no sdpa. auto: eager on a CPU in bf16, else sdpa. "
        "On a CPU, choose sdpa for sequences beyond about 1000 tokens: eager keeps [S, S] weights per head.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward: less memory, about a third more time.",
    )
    lora: LoraSection | None = Field(default=None, description="Train low-rank adapters instead of all weights.")
    value_head: ValueHeadSection | None = Field(default=None, description="Add a critic; needed by GAE and PPO.")
    chunk_rows: int = Field(
        default=0, ge=0, description="Response tokens per head chunk; 0: chosen by device and vocabulary."
    )
    token_budget: int = Field(default=0, ge=0, description="Padded tokens per forward call; 0: chosen by device.")
    share_prefixes: bool = Field(
        default=True, description="Compute what responses to one prompt share once; off where the self-test objects."
    )
    self_test: bool = Field(default=True, description="Compare forward and head with the model's own code at load.")
