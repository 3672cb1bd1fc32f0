"""The training loop. A step reads top to bottom in `Trainer.step`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.plan import Metrics, Plan, Update
from tokenloom.policy import Policy
from tokenloom.signals import Signals
from tokenloom.tasks import Task, Verifier
from tokenloom.tasks.sources.corpus import shown
from tokenloom.train import saving
from tokenloom.train.collect import Collected, Collector
from tokenloom.train.corpus import CorpusStream
from tokenloom.train.data import PromptStream, derive
from tokenloom.train.diagnosis import diagnosed, diagnosis
from tokenloom.train.dump import save_bad_batch, token_lines
from tokenloom.train.early_stop import reason_to_stop
from tokenloom.train.errors import TrainingDiverged
from tokenloom.train.evaluate import Evaluation, evaluate
from tokenloom.train.events import Observer
from tokenloom.train.optim import Optimizer
from tokenloom.train.recipe import Recipe
from tokenloom.train.record import step_record
from tokenloom.train.respond import Responder
from tokenloom.train.run import RunFolder

MAX_BAD_STEPS = 3

_WAVE_TOKENS = 16384
"""Response tokens of an evaluation wave: wide enough to keep the cores busy, its cache well below a GiB."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, held-out accuracy before and after, where the results are."""

    run: Path
    steps: int
    before: Evaluation | None
    after: Evaluation
    stopped_early: bool


class Trainer:
    """A run: what it holds is made at once, and all that changes from step to step is in its checkpoints."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, policy: Policy, task: Task, verifier: Verifier, observer: Observer
    ) -> None:
        self.recipe, self.run, self.policy, self.task = recipe, run, policy, task
        self.observer = observer
        self.algorithm = recipe.build_algorithm()
        self.optimizer = Optimizer(policy.trainable_parameters(), recipe.train)
        self.stream = PromptStream(task, recipe.train.seed, recipe.task.tiers)
        text = recipe.corpus
        self.corpus = None if text is None else CorpusStream(text, policy.tokenizer, recipe.train.seed)
        rollout = recipe.rollout
        responder = partial(
            Responder,
            policy,
            verifier,
            environment=task.environment,
            max_turns=rollout.max_turns,
            total_tokens=rollout.total_tokens,
        )
        self.responder = responder(max_rows=rollout.max_rows)
        # An evaluation answers many more prompts than a step; in waves its cache stays as small as a step's.
        step_rows = rollout.prompts_per_step * rollout.group_size
        waves = rollout.max_rows or max(step_rows, min(256, _WAVE_TOKENS // rollout.max_tokens))
        self.examiner = responder(max_rows=waves)
        self.collector = Collector(recipe, self.responder, self.stream)
        self.state: dict[str, Any] = {}
        self.done = 0
        self.bad_steps = 0
        self.best: list[float] = []
        self.stopped = False
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        policy.prepare(sorted(self.algorithm.needs | self.algorithm.loss_needs | self.algorithm.corpus_needs))

    # -- the run ------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run to the last step (or an early stop), evaluating and saving on the way.

        What `restore` found done is not done again: of a finished run nothing changes.

        Raises:
            TrainingDiverged: when three steps in a row had no finite loss or gradient, or weights are not finite.
        """
        config = self.recipe.train
        if self.done == 0:
            self.before = self._evaluate(0, config.eval.samples)
            self._samples(self.before, 0)
        while self.done < config.steps and not self.stopped:
            self.step(self.done)
            self.done += 1
            self.after = None
            last = self.done == config.steps
            if config.eval.every and self.done % config.eval.every == 0 and not last:
                self.stopped = self._enough(self._evaluate(self.done, config.eval.samples))
            if config.checkpoint_every and self.done % config.checkpoint_every == 0 and not (last or self.stopped):
                self.save_checkpoint()
        if self.after is None:
            self.after = self._evaluate(self.done, config.eval.final_samples)
            self._samples(self.after, self.done)
            self.save_checkpoint()
        if not self.run.finished:
            self.save_model()
            self.run.finish({"steps": self.done, "stopped_early": self.stopped})
        return Outcome(self.run.path, self.done, self.before, self.after, self.stopped)

    # -- the step -----------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """One training step: sample and score, signals, plan, then update by update."""
        started = time.perf_counter()
        total = self.recipe.train.steps
        algorithm, policy = self.algorithm, self.policy
        generator = self._generator(step)

        with diagnosed(f"step {step + 1}", policy, self.run.path):
            collected = self.collector.collect(algorithm, step, self.state, partial(self.observer.progress, "rollout"))
        rollouts = collected.rollouts
        sampled_at = time.perf_counter()

        signals = policy.signals(rollouts, sorted(algorithm.needs)) if algorithm.needs else Signals()
        plan = algorithm.plan(rollouts, signals, self.state, step=step, total_steps=total, generator=generator)
        self._dump(collected, plan, step)
        text = None if self.corpus is None else self.corpus.draw(step, collected.items)

        metrics = Metrics()
        norms: list[float] = []
        skipped = 0
        for number, update in enumerate(plan.updates):
            if algorithm.needs_refresh:
                seen = policy.signals(rollouts.rows(update.rows), sorted(algorithm.loss_needs), given=update.given)
                update = algorithm.refresh(update, seen, generator)
            finite, batch, live = True, update, Signals()
            for rows in self._micro_batches(rollouts, update):
                batch = update[rows]
                # Only tokens that can have an effect reach the model's head, and nothing behind the last of them.
                acting = rollouts.rows(batch.rows).replace(mask=batch.live)
                live = policy.signals(acting, sorted(algorithm.loss_needs), grad=True, given=batch.given)
                loss, measured = algorithm.loss(live, batch)
                finite = finite and math.isfinite(float(loss.detach()))
                if not finite:
                    break
                policy.backward(loss)
                metrics.merge([measured])
            if text is not None and finite:
                finite = self._read(text, step, metrics)
            norm = self.optimizer.step(step) if finite else None
            if norm is None:
                self.optimizer.clear()
                skipped += 1
                folder = self.run.path / "bad" / f"step-{step + 1:06d}-update-{number + 1}"
                save_bad_batch(folder, rollouts, live, plan, batch.rows)
                if text is not None:
                    text.save(folder / "corpus")
                self._skipped(step, folder, "gradient" if finite else "loss")
            else:
                norms.append(norm)
        self.state = plan.state

        for message in collected.messages:
            self.observer.message(f"verifier: {message}")
        record = step_record(
            step, collected, plan, metrics.result(),
            learning_rate=self.optimizer.learning_rate(step), grad_norms=norms, skipped=skipped,
            refill=algorithm.refill,
        )  # fmt: skip
        ended = time.perf_counter()
        tokens = int(rollouts.mask.sum())
        timing = {
            "step": step + 1,
            "seconds": ended - started,
            "rollout_seconds": sampled_at - started,
            "train_seconds": ended - sampled_at,
            "tokens_per_second": tokens / max(ended - started, 1e-9),
        }
        self.run.append("metrics.jsonl", record)
        self.run.append("timing.jsonl", timing)
        self.observer.step(record, timing, total)
        self._count_bad(bool(skipped))

    def _read(self, text: Rollouts, step: int, metrics: Metrics) -> bool:
        """Add the gradient of the terms over a corpus to the update's; False where their loss is no number."""
        needs, total = sorted(self.algorithm.corpus_needs), self.recipe.train.steps
        acting = text.mask.any(-1).nonzero().reshape(-1)
        for part in self.policy.micro_batches(text.rows(acting), self.recipe.train.micro_batch_tokens):
            rows = acting[part]
            signals = self.policy.signals(text.rows(rows), needs, grad=True)
            loss, measured = self.algorithm.corpus_loss(signals, text, rows, step=step, total_steps=total)
            if not math.isfinite(float(loss.detach())):
                return False
            self.policy.backward(loss)
            metrics.merge([measured])
        return True

    def _generator(self, step: int) -> torch.Generator:
        """What the parts of a step draw from."""
        return torch.Generator().manual_seed(derive(self.recipe.train.seed, "plan", step))

    def _micro_batches(self, rollouts: Rollouts, update: Update) -> Iterator[Tensor]:
        """Live rows of an update, cut so that the tokens computed at once stay within the budget.

        Rows that the plan leaves without effect never reach the model.
        """
        live = update.live_rows
        done = 0
        acting = rollouts.rows(update.rows[live]).replace(mask=update.live[live])
        for part in self.policy.micro_batches(acting, self.recipe.train.micro_batch_tokens):
            yield live[part]
            done += len(part)
            self.observer.progress("update", done, len(live), 0)

    # -- measuring ----------------------------------------------------------------------------------

    def _evaluate(self, step: int, samples: int | None) -> Evaluation:
        config = self.recipe.train.eval
        # At the last budget, so that evaluations of one run compare.
        items = [shown(item, 1.0) for item in self.task.heldout[: config.problems]]
        with diagnosed(f"evaluation after step {step}", self.policy, self.run.path):
            result = evaluate(
                self.examiner,
                items,
                max_tokens=self.recipe.rollout.max_tokens,
                samples=config.samples if samples is None else samples,
                temperature=config.temperature,
                stop=self.recipe.rollout.stop,
                seed=self.recipe.train.seed,
                report=partial(self.observer.progress, "evaluate"),
            )
        record = result.record(step)
        self.run.append("metrics.jsonl", record)
        self.observer.evaluation(record)
        return result

    def _samples(self, evaluation: Evaluation, step: int) -> None:
        for line in evaluation.greedy_answers[: self.recipe.log.samples]:
            self.run.append("samples.jsonl", {"step": step, **line, "expected": str(line["expected"])})

    def _enough(self, evaluation: Evaluation) -> bool:
        reason = reason_to_stop(self.recipe.train.early_stop, evaluation, self.best)
        if reason is not None:
            self.observer.message(f"stopping: {reason}")
        return reason is not None

    def _dump(self, collected: Collected, plan: Plan, step: int) -> None:
        every = self.recipe.log.tokens_every
        if every and (step % every == 0 or step + 1 == self.recipe.train.steps):
            lines = token_lines(
                collected, plan, self.algorithm, self.policy, self.recipe.log.tokens_rows, self.state,
                step=step, total_steps=self.recipe.train.steps, generator=self._generator(step), run=self.run.path,
            )  # fmt: skip
            for line in lines:
                self.run.append("tokens.jsonl", line)

    # -- trouble ------------------------------------------------------------------------------------

    def _skipped(self, step: int, folder: Path, what: str) -> None:
        self.observer.message(f"step {step + 1}: the {what} is not a number; update skipped, batch kept in {folder}")

    def _count_bad(self, bad: bool) -> None:
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if self.bad_steps >= MAX_BAD_STEPS:
            what = f"{MAX_BAD_STEPS} steps in a row were skipped; their batches are in {self.run.path / 'bad'}"
            raise TrainingDiverged(diagnosis(what, self.policy, self.run.path))

    # -- saving -------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save everything that changes, atomically.

        Raises:
            TrainingDiverged: when weights are not finite; the checkpoint before stays.
        """
        saving.save_checkpoint(self)

    def restore(self) -> int:
        """Continue from the newest whole checkpoint; returns its step (0 without one)."""
        return saving.restore(self)

    def reconsider(self) -> None:
        """Forget why the run stopped: the recipe has changed since."""
        self.stopped, self.bad_steps = False, 0

    def save_model(self) -> None:
        """Write `model/`, an ordinary Hugging Face folder, in one piece."""
        saving.save_model(self.policy, self.run.path)
