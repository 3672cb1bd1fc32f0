"""`TaskConfig`: the `task:` section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from tokenloom.tasks.names import unknown

SOURCE_FORMS = "`reasoning_gym:<name>`, a path ending in `.jsonl`, `hf:<dataset>`, or `corpus:<text file>`"
_KINDS = ("reasoning_gym", "hf", "corpus")
_FIELDS = ("prompt", "messages", "answer")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RewardConfig(_Strict):
    """One verifier and how much it counts: the reward is the sum of `weight * verifier`."""

    verifier: str = Field(
        description="a built-in name (exact, number, math, regex, choice, reasoning_gym), "
        "`package.module:function`, or `path/to/file.py:function`"
    )
    weight: float = Field(default=1.0, allow_inf_nan=False)
    params: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the verifier")

    @model_validator(mode="after")
    def _known(self) -> Self:
        # Imported late: the registry names verifiers, which speak of items, not of recipes.
        from tokenloom.tasks.verifiers import check

        check(self.verifier, self.params)
        return self


def check_source(source: str) -> str:
    """The source itself; raises ValueError unless it has one of the known forms."""
    kind, colon, name = source.partition(":")
    if source.lower().endswith((".jsonl", ".ndjson")) and kind not in _KINDS:
        return source
    if colon and kind in _KINDS:
        if not name.strip():
            raise ValueError(f"source {source!r} names no data set after the colon; a source is {SOURCE_FORMS}")
        return source
    hint = ""
    if colon and re.fullmatch(r"\w[\w-]+", kind):
        hint = " " + unknown("source kind", kind, _KINDS) + "."
    elif source.lower().endswith(".json"):
        hint = " One JSON object a line makes a `.jsonl` file."
    raise ValueError(f"source {source!r} is not understood.{hint} A source is {SOURCE_FORMS}")


def check_fields(fields: dict[str, str]) -> dict[str, str]:
    """The fields themselves; raises ValueError for an unknown or contradictory name."""
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(unknown("field", name, _FIELDS))
    if "prompt" in fields and "messages" in fields:
        raise ValueError("fields: give `prompt` or `messages`, not both")
    return fields


SourceName = Annotated[str, AfterValidator(check_source), Field(description=SOURCE_FORMS)]
FieldNames = Annotated[
    dict[str, str],
    AfterValidator(check_fields),
    Field(description="names of the columns that hold prompt, messages and answer"),
]
SourceParams = Annotated[
    dict[str, Any],
    Field(
        description="reasoning_gym: parameters of the data set; hf: name, revision, data_dir, data_files; "
        "corpus: context, min_words, instruction, budget, decay, min_budget"
    ),
]
SplitName = Annotated[str, Field(description="hf: which split to read")]


class SourceConfig(_Strict):
    """Where items come from."""

    source: SourceName
    params: SourceParams = Field(default_factory=dict)
    split: SplitName = "train"
    fields: FieldNames = Field(default_factory=dict)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="share of `size` among several sources")


class TierConfig(_Strict):
    """From which tier of difficulty (an item's `tier`) prompts are drawn: `first` until `begin`, `last` from `end`."""

    first: dict[str, float] = Field(description="share of each tier up to `begin`; they sum to 1")
    last: dict[str, float] = Field(description="share of each tier from `end` on; linear in between")
    begin: float = Field(default=0.3, description="fraction of the run at which the shares begin to move")
    end: float = Field(default=0.7, description="fraction of the run at which they have moved")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.at(0.0)
        return self

    def at(self, progress: float) -> dict[str, float]:
        """The share of each tier at `progress` in [0, 1] of the run."""
        # Imported late: it brings PyTorch, which workers that only verify do without.
        from tokenloom.methods.policy_optimization.rmt import tier_probabilities

        return tier_probabilities(progress, self.first, self.last, begin=self.begin, end=self.end)


class TaskConfig(_Strict):
    """What to learn and how answers are scored.

    Either one `source` (with `params`, `split`, `fields`) or a list `sources`. With `curriculum`,
    `Task.stage` opens the sources one after the other, in the order of the list.
    """

    source: SourceName | None = None
    params: SourceParams = Field(default_factory=dict)
    split: SplitName = "train"
    fields: FieldNames = Field(default_factory=dict)
    sources: list[SourceConfig] = Field(default_factory=list, description="several sources, mixed by weight")
    curriculum: bool = Field(default=False, description="open `sources` one after the other, easiest first")
    tiers: TierConfig | None = Field(default=None, description="draw prompts by their tier of difficulty")
    size: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="distinct problems to draw; default 1000 for generated data, everything for files",
    )
    seed: int = Field(default=0, ge=0, description="where generated data starts; never decides the split")
    heldout: int | float | SourceConfig = Field(
        default=0.2,
        description="fraction (0 < x < 1) or count of problems never trained on, or a source of its own",
    )
    chat: bool = Field(default=True, description="show a plain prompt as a user message (False: text to continue)")
    system: str | None = Field(default=None, description="system message put before every chat")
    prompt_suffix: str = Field(default="", description="appended to the last user message, after a space")
    rewards: list[RewardConfig] = Field(
        default_factory=list,
        description="default: reasoning_gym's own scorer for its data, `exact` otherwise",
    )
    workers: int = Field(default=2, ge=1, le=256, description="processes that run verifiers which could hang")
    timeout: float = Field(default=10.0, gt=0, le=3600, description="seconds a verifier may take for one response")
    environment: str | None = Field(
        default=None,
        description="multi-turn environment: `calculator`, `package.module:Class`, or `file.py:Class`",
    )
    environment_params: dict[str, Any] = Field(default_factory=dict)

    @field_validator("heldout", mode="before")
    @classmethod
    def _not_bool(cls, heldout: Any) -> Any:
        if isinstance(heldout, bool):
            raise ValueError(f"expected a fraction, a count or a source, got {heldout}")
        return heldout

    @field_validator("heldout")
    @classmethod
    def _heldout_range(cls, heldout: int | float | SourceConfig) -> int | float | SourceConfig:
        if isinstance(heldout, float) and not 0 < heldout < 1:
            raise ValueError(f"a fraction must lie strictly between 0 and 1, got {heldout}; a count is a whole number")
        if isinstance(heldout, int) and heldout < 1:
            raise ValueError(f"at least one problem must be held out, got {heldout}")
        return heldout

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) == (not self.sources):
            raise ValueError(f"give exactly one of `source` and `sources`; a source is {SOURCE_FORMS}")
        if self.sources and (self.params or self.fields):
            raise ValueError("with `sources`, `params` and `fields` belong inside each entry of the list")
        if self.curriculum and len(self.sources) < 2:
            raise ValueError("curriculum: true needs at least two entries in `sources`, the easiest first")
        if self.curriculum and self.tiers is not None:
            raise ValueError("`curriculum` and `tiers` both say which prompts are drawn; keep one of them")
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs chat: true; with chat: false prompts are plain text")
        if self.environment is None and self.environment_params:
            raise ValueError("`environment_params` needs `environment`")
        if self.environment is not None:
            from tokenloom.tasks.environments import check_environment

            check_environment(self.environment)
        return self

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The sources as a list, whichever way they were given."""
        if self.source is None:
            return self.sources
        return [SourceConfig(source=self.source, params=self.params, split=self.split, fields=self.fields)]

    @property
    def all_rewards(self) -> list[RewardConfig]:
        """The rewards, or the source's default."""
        if self.rewards:
            return self.rewards
        generated = all(source.source.startswith("reasoning_gym:") for source in self.all_sources)
        return [RewardConfig(verifier="reasoning_gym" if generated else "exact")]
