"""A GRPO step, Tokenloom against TRL's GRPOTrainer: rollout, reward, loss, backward, optimizer.

Both sides: the same weights, prompts of the same number of tokens, responses of exactly `new_tokens` tokens (no token
ends a response), temperature 1, beta 0, sequence-mean loss, one update a step, AdamW with float32 weights and moments,
gradients clipped at 1; bf16 means autocast. One step warms up.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.child import Turns
from bench.harness import PEAK, SECONDS, Metric, Row, Side, Table, Target, main
from bench.inputs import SMOLLM2, model_folder, prompts

if TYPE_CHECKING:
    from tokenloom.train.loop import Trainer

LEARNING_RATE = 1e-6
_MANY = 10_000  # steps that a run may take; the harness ends it


def score(text: str) -> float:
    """The reward: the share of vowels and odd digits. Cheap, and never equal over a whole group."""
    return sum(text.count(letter) for letter in "aeiou13579") / (len(text) + 1)


def verify(response: str, item: Any) -> float:
    """`score` as Tokenloom calls it."""
    return score(response)


@contextmanager
def running_trainer(
    *,
    model: str,
    groups: int,
    group_size: int,
    prompt_tokens: int,
    new_tokens: int,
    precision: str,
    train: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """Tokenloom's trainer with its defaults; `train` and `settings` update the recipe's `train` and `model` section."""
    from tokenloom.train.recipe import build_recipe
    from tokenloom.train.session import Session

    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "problems.jsonl"
        lines = [{"prompt": text, "answer": ""} for text in prompts(model, 4 * groups + 1, prompt_tokens)]
        problems.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        recipe = build_recipe(
            {
                "name": "bench",
                "model": {
                    "name": str(model_folder(model)),
                    "autocast": "bf16" if precision == "bf16" else "none",
                    **settings,
                },
                "task": {
                    "source": str(problems),
                    "heldout": 1,
                    "chat": False,
                    "workers": 1,
                    "rewards": [{"verifier": "bench.grpo_step:verify"}],
                },
                "algorithm": {"preset": "grpo", "kl_coef": 0.0},
                "rollout": {"prompts_per_step": groups, "group_size": group_size, "max_tokens": new_tokens},
                "train": {"steps": _MANY, "learning_rate": LEARNING_RATE, **(train or {})},
                "log": {"tokens_every": 0},
            }
        )
        with Session(recipe, Path(folder) / "run", []) as session:
            session.trainer.policy.eos_ids = frozenset()
            yield session.trainer


def tokenloom(turns: Turns, *, warm_up: bool, groups: int, group_size: int, **settings: Any) -> None:
    """Steps of Tokenloom's trainer."""
    with running_trainer(groups=groups, group_size=group_size, **settings) as trainer:
        if warm_up:
            trainer.step(0)
        for number, _ in enumerate(turns, start=1):
            started = time.perf_counter()
            trainer.step(number)
            seconds = time.perf_counter() - started
            rollout = _last_line(trainer.run.path / "timing.jsonl")["rollout_seconds"]
            length = _last_line(trainer.run.path / "metrics.jsonl")["response_length"]
            turns.report(
                seconds=seconds,
                rollout_seconds=rollout,
                update_seconds=seconds - rollout,
                tokens=round(length * groups * group_size),
            )


def _last_line(path: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return line


def trl(
    turns: Turns,
    *,
    model: str,
    groups: int,
    group_size: int,
    prompt_tokens: int,
    new_tokens: int,
    precision: str,
    warm_up: bool,
    micro_batch: int,
    gradient_checkpointing: bool,
    attention: str,
    **settings: Any,
) -> None:
    """TRL's trainer; `micro_batch` rows go through the model at once, `settings` are of GRPOConfig."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Timed(GRPOTrainer):
        """Says how long the rollout with its rewards took, and how many tokens it gave."""

        rollout_seconds, tokens = 0.0, 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            self.rollout_seconds = time.perf_counter() - started
            self.tokens = int(made["completion_mask"].sum())
            return made

    class Clock(TrainerCallback):
        """From one step's end, or the harness's word to go on, to the next step's end."""

        def wait(self) -> bool:
            go_on = turns.wait()
            self.started = time.perf_counter()
            return go_on

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.warming = warm_up
            if not warm_up:
                self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.warming:
                seconds, rollout = time.perf_counter() - self.started, trainer.rollout_seconds
                turns.report(
                    seconds=seconds, rollout_seconds=rollout, update_seconds=seconds - rollout, tokens=trainer.tokens
                )
            self.warming = False
            control.should_training_stop = not self.wait()

    def scores(completions: list[str], **_: Any) -> list[float | None]:
        return [score(text) for text in completions]

    rows = groups * group_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=str(model_folder(model)),
            reward_funcs=scores,
            train_dataset=Dataset.from_dict({"prompt": prompts(model, 4 * groups, prompt_tokens)}),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=precision == "bf16",
                model_init_kwargs={"dtype": "float32", "attn_implementation": attention},
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=rows // micro_batch,
                num_generations=group_size,
                max_completion_length=new_tokens,
                generation_kwargs={"eos_token_id": None},
                temperature=1.0,
                beta=0.0,
                loss_type="grpo",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                gradient_checkpointing=gradient_checkpointing,
                max_steps=_MANY,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                **settings,
            ),
            callbacks=[Clock()],
        )
        trainer.eos_token_ids = []
        trainer.train()


# -- tables

SHAPES = {
    "(1) short": {"groups": 4, "group_size": 8, "prompt_tokens": 60, "new_tokens": 32},
    "(2) long prompts": {"groups": 4, "group_size": 8, "prompt_tokens": 512, "new_tokens": 32},
    "(3) long responses": {"groups": 2, "group_size": 8, "prompt_tokens": 60, "new_tokens": 256},
}
SMALL = {"groups": 2, "group_size": 4, "prompt_tokens": 16, "new_tokens": 8}


def trl_settings(
    micro_batch: int, attention: str, *, gradient_checkpointing: bool = False, **settings: Any
) -> dict[str, Any]:
    """Settings of TRL's side."""
    return {
        "micro_batch": micro_batch,
        "attention": attention,
        "gradient_checkpointing": gradient_checkpointing,
        **settings,
    }


def described(settings: Mapping[str, Any]) -> str:
    """Settings of TRL's side in words."""
    words = [f"{settings['micro_batch']} rows a forward", f"{settings['attention']} attention"]
    if settings["gradient_checkpointing"]:
        words.append("gradient checkpointing")
    if "cache_implementation" in settings:
        words.append(f"{settings['cache_implementation']} cache")
    return ", ".join(words)


# What the table "TRL's settings" found fastest; in float32 sdpa is never slower than eager.
FASTEST = {
    ("(1) short", "bf16"): trl_settings(8, "eager"),
    ("(1) short", "float32"): trl_settings(8, "sdpa"),
    ("(2) long prompts", "bf16"): trl_settings(4, "sdpa"),
    ("(2) long prompts", "float32"): trl_settings(4, "sdpa"),
    ("(3) long responses", "bf16"): trl_settings(4, "eager"),
    ("(3) long responses", "float32"): trl_settings(4, "sdpa"),
}
WHOLE = trl_settings(32, "sdpa")
INSTALL = "install it with: pip install 'tokenloom[bench]'"


def sides(work: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Side, Side]:
    """Tokenloom with its defaults and TRL with `settings`, doing the same work."""
    return (
        Side("Tokenloom", "bench.grpo_step:tokenloom", work, ("tokenloom",), about="its defaults"),
        Side("TRL", "bench.grpo_step:trl", {**work, **settings}, ("trl",), INSTALL, about=described(settings)),
    )


def shown(work: Mapping[str, Any]) -> str:
    """A row's work in words."""
    return (
        f"{work['groups']} × {work['group_size']}, {work['prompt_tokens']} + {work['new_tokens']} tokens, "
        f"{work['precision']}"
    )


def rows(quick: bool) -> list[Row]:
    """The three shapes in both formats; the first also against TRL with the whole batch at once."""
    if quick:
        work = {"model": "random-1024", **SMALL, "precision": "bf16", "warm_up": True}
        return [Row(shown(work), sides(work, trl_settings(8, "sdpa")), targets=_targets(3.0, memory=True))]
    made = []
    for name, shape in SHAPES.items():
        short = name == "(1) short"
        for precision in ("bf16", "float32"):
            # At the longer shapes a step is a minute: five cold ones say as much as warm ones.
            work = {"model": SMOLLM2, **shape, "precision": precision, "warm_up": short}
            made.append(
                Row(
                    f"{name}: {shown(work)}",
                    sides(work, FASTEST[name, precision]),
                    targets=_targets(6.0 if "prompts" in name else 3.0, memory=name != "(3) long responses"),
                    long=not short and precision == "float32",
                )
            )
            if short and precision == "bf16":
                label = f"{name}: {shown(work)}; TRL at once"
                made.append(Row(label, sides(work, WHOLE), targets=_targets(3.0, memory=True)))
    return made


def _targets(speed: float, *, memory: bool) -> tuple[Target, ...]:
    wanted = (Target("seconds", "TRL", at_least=speed),)
    return (*wanted, Target("peak_rss", "TRL", at_least=3.0)) if memory else wanted


METRICS = (
    SECONDS,
    Metric("rollout_seconds", "rollout", "s", compare=False),
    Metric("update_seconds", "update", "s", compare=False),
    PEAK,
)
TABLE = Table("grpo-step", "A GRPO step", rows, METRICS)

if __name__ == "__main__":
    main(TABLE)
