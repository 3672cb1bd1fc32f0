"""`load_task`: from the `task:` section of a recipe to train and held-out items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tokenloom.tasks.config import SourceConfig, TaskConfig
from tokenloom.tasks.environment import Environment
from tokenloom.tasks.item import Item
from tokenloom.tasks.sources import corpus, gym, hf, jsonl
from tokenloom.tasks.split import Split, split_given, split_items

EnvironmentFactory = Callable[[], Environment]


@dataclass(frozen=True)
class Task:
    """Problems to train on and problems never trained on.

    `train` is in the order of the items' content keys, or with a curriculum source after source.
    `stages` are the training items of each source (one stage without a curriculum); `environment`
    makes multi-turn environments, None for single-turn tasks; `report` is a summary to print.
    """

    name: str
    train: Sequence[Item]
    heldout: Sequence[Item]
    environment: EnvironmentFactory | None
    stages: tuple[tuple[Item, ...], ...]
    report: str

    def stage(self, progress: float) -> Sequence[Item]:
        """The training items open at `progress` in [0, 1] of a run.

        Without a curriculum all of them. With n sources, the first is open from the start and one
        more at each 1/n of the run; opened ones stay open, so that nothing learned is forgotten.
        """
        opened = min(int(max(progress, 0.0) * len(self.stages)) + 1, len(self.stages))
        return [item for stage in self.stages[:opened] for item in stage]


def check_task(config: TaskConfig) -> None:
    """Refuses what can be refused before anything is generated, read or downloaded.

    Raises:
        ValueError: a missing file, an unknown data set, unknown or impossible parameters.
    """
    heldout = [config.heldout] if isinstance(config.heldout, SourceConfig) else []
    for source in [*config.all_sources, *heldout]:
        kind, _, name = source.source.partition(":")
        if kind == "reasoning_gym":
            gym.check(name, source.params)
        elif kind == "hf":
            hf.check(name, source.params)
        elif kind == "corpus":
            corpus.check(name, source.params)
        else:
            jsonl.check(source.source)
            if source.params:
                raise ValueError(f"a file has no parameters, got params={source.params} for {source.source!r}")


def load_task(config: TaskConfig) -> Task:
    """Draws or reads the items, splits them by content, and proves the sides disjoint.

    Raises:
        ValueError: as `check_task`, or when a source holds something malformed or too few items.
    """
    check_task(config)
    sources = config.all_sources
    total = sum(source.weight for source in sources)
    items: list[Item] = []
    notes: list[str] = []
    stage_of: dict[str, int] = {}
    for index, source in enumerate(sources):
        share = None if config.size is None else max(1, round(config.size * source.weight / total))
        drawn, note = _draw(source, share, config.seed)
        items.extend(drawn)
        notes.extend([note] if note else [])
        for item in drawn:
            stage_of.setdefault(item.key, index)
    split = replace(split := _split(items, config), notes=(*split.notes, *notes))
    stages: list[list[Item]] = [[] for _ in sources] if config.curriculum else [[]]
    for item in split.train:
        stages[stage_of[item.key] if config.curriculum else 0].append(_shown(item, config))
    name = " + ".join(source.source for source in sources)
    return Task(
        name=name,
        train=tuple(item for stage in stages for item in stage),
        heldout=tuple(_shown(item, config) for item in split.heldout),
        environment=_environment(config),
        stages=tuple(tuple(stage) for stage in stages if stage),
        report=f"{name}: {split.summary()}",
    )


def _draw(source: SourceConfig, size: int | None, seed: int) -> tuple[list[Item], str]:
    kind, _, name = source.source.partition(":")
    if kind == "reasoning_gym":
        return gym.draw(name, source.params, seed=seed, size=size or gym.DEFAULT_SIZE)
    if kind == "hf":
        items = hf.read(name, source.params, source.split, source.fields)
    elif kind == "corpus":
        items = corpus.read(name, source.params)
    else:
        items = jsonl.read(source.source, source.fields)
    # By key, so that the sample does not depend on the order of the file; every copy of a chosen
    # prompt stays, since copies that disagree must be seen by the check for conflicts.
    chosen = set(sorted({item.key for item in items})[:size])
    return [item for item in items if item.key in chosen], ""


def _split(items: list[Item], config: TaskConfig) -> Split:
    if isinstance(config.heldout, SourceConfig):
        held, _ = _draw(config.heldout, None, config.seed)
        return split_given(items, held)
    if isinstance(config.heldout, int):
        return split_items(items, heldout_size=config.heldout)
    return split_items(items, heldout_fraction=config.heldout)


def _shown(item: Item, config: TaskConfig) -> Item:
    """The item as the model sees it; after the split, so that wording never moves a problem across."""
    messages = item.messages
    if messages is None and config.chat:
        messages = ({"role": "user", "content": item.prompt or ""},)
    if messages is None:
        return replace(item, prompt=_joined(item.prompt or "", config.prompt_suffix))
    if config.prompt_suffix:
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
        content = _joined(messages[last]["content"], config.prompt_suffix)
        messages = (*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :])
    if config.system is not None:
        messages = (
            {"role": "system", "content": config.system},
            *(m for m in messages if m["role"] != "system"),
        )
    return replace(item, messages=messages, prompt=None)


def _joined(text: str, suffix: str) -> str:
    return text + suffix if not suffix or suffix[0].isspace() else f"{text} {suffix}"


def _environment(config: TaskConfig) -> EnvironmentFactory | None:
    if config.environment is None:
        return None
    from tokenloom.tasks.environments import environment_factory

    return environment_factory(config.environment, config.environment_params)
