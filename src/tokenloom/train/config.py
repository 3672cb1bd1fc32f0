"""`TrainConfig` and `LogConfig`: the recipe's `train:` and `log:` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Decay = Annotated[float, Field(ge=0, lt=1)]
Tracker = Literal["tensorboard", "trackio", "wandb"]
States = Literal["float32", "bfloat16", "int8"]


class EarlyStop(BaseModel):
    """Stop before the last step, judged at each evaluation on held-out problems."""

    model_config = ConfigDict(extra="forbid")

    metric: Literal["greedy", "sampled"] = Field("greedy", description="Which held-out accuracy is watched.")
    target: float | None = Field(None, ge=0, le=1, description="Stop once the metric reaches this value.")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without a new best.")


class EvalConfig(BaseModel):
    """What is measured on held-out problems, and when. The first and the last step are always measured."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after.")
    problems: int | None = Field(None, ge=1, description="Held-out problems to use; unset: all.")
    samples: int = Field(4, ge=0, description="Responses sampled for each problem; 0: greedy only.")
    final_samples: int | None = Field(None, ge=0, description="As `samples`, after the last step; unset: the same.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Temperature of the sampled responses.")


class TrainConfig(BaseModel):
    """How long and how fast the policy is updated."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(50, ge=1, description="Training steps: each samples a batch and updates on it.")
    seed: int = Field(0, ge=0, description="Decides prompts, responses and initial adapters.")
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate rises linearly from 0.")
    final_fraction: float = Field(0.0, ge=0, le=1, description="Rate at the last step over the peak, if decaying.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay of first and second moments.")
    adam_eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's decoupled weight decay.")
    optimizer_states: States = Field(
        "float32",
        description="Format of AdamW's two moments: 8, 4 or 2 bytes a weight. bfloat16 is rounded stochastically; int8 "
        "needs bitsandbytes (the extra `lowmem`) and is slow on a CPU.",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, allow_inf_nan=False, description="Clip the gradient to this norm; null: never."
    )
    micro_batch_tokens: int = Field(
        1024,
        ge=1,
        description="Prompt and response tokens that go through the model at once, shared prefixes once; up to a tenth "
        "more where this makes one micro-batch fewer. A row that needs about as many or more takes rows of the same "
        "prompt along, up to half as many tokens again.",
    )
    max_sampling_rounds: int = Field(
        4, ge=1, description="Times a step may sample anew when the algorithm drops groups (dynamic sampling)."
    )
    checkpoint_every: int = Field(20, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_checkpoints: int = Field(1, ge=1, description="How many of the newest checkpoints are kept.")
    early_stop: EarlyStop | None = Field(None, description="Stop before the last step.")
    eval: EvalConfig = Field(default_factory=EvalConfig)


class LogConfig(BaseModel):
    """What a run leaves behind besides metrics.jsonl."""

    model_config = ConfigDict(extra="forbid")

    trackers: list[Tracker] = Field(default_factory=list, description="Also send metrics to these.")
    project: str = Field("tokenloom", description="Project name for the trackers.")
    tokens_every: int = Field(10, ge=0, description="Steps between dumps of per-token quantities; 0: never.")
    tokens_rows: int = Field(32, ge=1, description="Most responses per dump; whole groups are taken first.")
    samples: int = Field(24, ge=0, description="Held-out answers kept before and after training.")
    report: bool = Field(True, description="Write report.html at the end.")
