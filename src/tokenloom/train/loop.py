"""The training loop. A step reads top to bottom in `Trainer.step`."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.masked import masked_mean
from tokenloom.plan import Metrics, Plan, Update
from tokenloom.policy import Policy
from tokenloom.signals import Signals
from tokenloom.tasks import Task, Verifier
from tokenloom.tasks.sources.corpus import shown
from tokenloom.train import checkpoint
from tokenloom.train.collect import Collected, Collector
from tokenloom.train.corpus import CorpusStream
from tokenloom.train.data import PromptStream, derive
from tokenloom.train.dump import cut, save_bad_batch, token_lines
from tokenloom.train.errors import TrainingDiverged
from tokenloom.train.evaluate import Evaluation, evaluate
from tokenloom.train.events import Observer
from tokenloom.train.optim import Optimizer
from tokenloom.train.recipe import Recipe
from tokenloom.train.respond import Responder
from tokenloom.train.run import RunFolder

log = logging.getLogger(__name__)

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
    """A run: everything it holds is made in `open`, everything that changes is in `checkpoint`."""

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

        with self._diagnosed(f"step {step + 1}"):
            collected = self.collector.collect(algorithm, step, self.state, partial(self._progress, "rollout"))
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

        record = self._record(step, collected, plan, metrics.result(), norms, skipped)
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
            self._progress("update", done, len(live), 0)

    # -- measuring ----------------------------------------------------------------------------------

    def _record(
        self, step: int, collected: Collected, plan: Plan, measured: dict[str, float], norms: list[float], skipped: int
    ) -> dict[str, Any]:
        rollouts = collected.rollouts
        record: dict[str, Any] = {
            "step": step + 1,
            "kind": "train",
            "reward": collected.first_reward,
            "accuracy": collected.first_accuracy,
            "response_length": float(rollouts.lengths.float().mean()),
            "lr": self.optimizer.learning_rate(step),
            "loss": measured.pop("loss", 0.0),
            "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        }
        if rollouts.sampler_logprobs is not None:
            # On policy the mean of -log pi(sampled token) estimates the entropy without another pass.
            record["entropy"] = -float(masked_mean(rollouts.sampler_logprobs, rollouts.mask))
        if rollouts.truncated is not None:
            record["truncated"] = float(rollouts.truncated.float().mean())
        if self.algorithm.refill:
            record |= {"sampling/rounds": collected.rounds, "sampling/groups": collected.sampled_groups}
        for name, values in rollouts.reward_components.items():
            if len(rollouts.reward_components) > 1:
                record[f"reward/{name}"] = float(values.nanmean())
        record |= {"verifier_errors": collected.errors} if collected.errors else {}
        record |= {"skipped_updates": skipped} if skipped else {}
        for text in collected.messages:
            self.observer.message(f"verifier: {text}")
        return record | {f"plan/{k}": v for k, v in plan.metrics.items()} | measured

    def _evaluate(self, step: int, samples: int | None) -> Evaluation:
        config = self.recipe.train.eval
        # At the last budget, so that evaluations of one run compare.
        items = [shown(item, 1.0) for item in self.task.heldout[: config.problems]]
        with self._diagnosed(f"evaluation after step {step}"):
            result = evaluate(
                self.examiner,
                items,
                max_tokens=self.recipe.rollout.max_tokens,
                samples=config.samples if samples is None else samples,
                temperature=config.temperature,
                stop=self.recipe.rollout.stop,
                seed=self.recipe.train.seed,
                report=partial(self._progress, "evaluate"),
            )
        record = result.record(step)
        self.run.append("metrics.jsonl", record)
        self.observer.evaluation(record)
        return result

    def _samples(self, evaluation: Evaluation, step: int) -> None:
        for line in evaluation.greedy_answers[: self.recipe.log.samples]:
            self.run.append("samples.jsonl", {"step": step, **line, "expected": str(line["expected"])})

    def _enough(self, evaluation: Evaluation) -> bool:
        stop = self.recipe.train.early_stop
        if stop is None:
            return False
        value = evaluation.greedy if stop.metric == "greedy" else evaluation.sampled
        if value is None:
            return False
        self.best.append(value)
        if stop.target is not None and value >= stop.target:
            self.observer.message(f"stopping: held-out {stop.metric} accuracy {value:.3f} reached {stop.target}")
            return True
        if stop.patience is not None and len(self.best) - 1 - self.best.index(max(self.best)) >= stop.patience:
            self.observer.message(f"stopping: no better {stop.metric} accuracy in {stop.patience} evaluations")
            return True
        return False

    def _dump(self, collected: Collected, plan: Plan, step: int) -> None:
        every = self.recipe.log.tokens_every
        if every and (step % every == 0 or step + 1 == self.recipe.train.steps):
            lines = token_lines(
                collected, plan, self.algorithm, self.policy, self.recipe.log.tokens_rows, self.state,
                step=step, total_steps=self.recipe.train.steps, generator=self._generator(step), run=self.run.path,
            )  # fmt: skip
            for line in lines:
                self.run.append("tokens.jsonl", line)

    def _progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        self.observer.progress(stage, done, total, tokens)

    # -- trouble ------------------------------------------------------------------------------------

    def _skipped(self, step: int, folder: Path, what: str) -> None:
        self.observer.message(f"step {step + 1}: the {what} is not a number; update skipped, batch kept in {folder}")

    def _count_bad(self, bad: bool) -> None:
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if self.bad_steps >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                self._diagnosis(
                    f"{MAX_BAD_STEPS} steps in a row were skipped; their batches are in {self.run.path / 'bad'}"
                )
            )

    @contextmanager
    def _diagnosed(self, when: str) -> Iterator[None]:
        """Sampling from a model whose logits are not numbers ends the run with a diagnosis."""
        try:
            yield
        except FloatingPointError as error:
            raise TrainingDiverged(self._diagnosis(f"{when}: {error}")) from error

    def _broken(self) -> list[str]:
        return [n for n, p in self.policy.trainable_parameters() if not bool(p.isfinite().all())]

    def _diagnosis(self, what: str) -> str:
        broken = self._broken()
        cause = (
            f"{len(broken)} weights are not finite, first {broken[0]!r}: an earlier update did the damage"
            if broken
            else "the weights are finite: the batch itself, or a part of the algorithm, gives what is not a number"
        )
        saved = checkpoint.steps(self.run.path / "checkpoints")
        back = f"its checkpoint of step {saved[-1]}" if saved else "its beginning"
        return (
            f"{what}. Now {cause}. Usual remedies: a lower train.learning_rate, a smaller train.max_grad_norm, "
            f"model.autocast=none instead of bf16. `tokenloom train --resume {self.run.path} KEY=VALUE` goes on from "
            f"{back}"
        )

    # -- saving -------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save everything that changes, atomically.

        Raises:
            TrainingDiverged: when weights are not finite; the checkpoint before stays.
        """
        if self._broken():
            raise TrainingDiverged(self._diagnosis(f"after step {self.done} no checkpoint was written"))
        progress = {
            "data": self.stream.position,
            "problems": self.stream.fingerprint,
            "files": self.run.sizes(),
            "best": self.best,
            "bad_steps": self.bad_steps,
            "stopped": self.stopped,
            "before": _plain(self.before),
            "after": _plain(self.after),
        }
        checkpoint.save(
            self.run.path / "checkpoints",
            checkpoint.Checkpoint(
                step=self.done,
                weights=self.policy.state_dict(),
                optimizer=self.optimizer.state(),
                algorithm=self.state,
                progress=progress,
            ),
            keep=self.recipe.train.keep_checkpoints,
        )

    def restore(self) -> int:
        """Continue from the newest whole checkpoint; returns its step (0 without one)."""
        found = checkpoint.load_newest(self.run.path / "checkpoints")
        cut(self.run.path, found.step if found else 0)
        if found is None:
            self.run.cut({})
            return 0
        checkpoint.tidy(self.run.path / "checkpoints", keep=self.recipe.train.keep_checkpoints)
        self.policy.load_state_dict(found.weights)
        self.optimizer.load(found.optimizer)
        self.state, self.done = found.algorithm, found.step
        self.stream.restore(found.progress["data"])
        if found.progress["problems"] != self.stream.fingerprint:
            self.observer.message("the training problems are not those that the run was begun with; on with the new")
        self.best, self.bad_steps = found.progress["best"], found.progress["bad_steps"]
        self.stopped = found.progress["stopped"]
        self.before, self.after = _evaluation(found.progress["before"]), _evaluation(found.progress["after"])
        for name in self.run.cut(found.progress["files"]):
            self.observer.message(f"{name} is shorter than it was at the checkpoint; the lines that are gone stay gone")
        return self.done

    def reconsider(self) -> None:
        """Forget why the run stopped: the recipe has changed since."""
        self.stopped, self.bad_steps = False, 0

    def save_model(self) -> None:
        """Write `model/`, an ordinary Hugging Face folder, in one piece."""
        target, temporary = self.run.path / "model", self.run.path / ".model-writing"
        shutil.rmtree(temporary, ignore_errors=True)
        self.policy.save(temporary)
        checkpoint.flush(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)


def _plain(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {n: getattr(evaluation, n) for n in ("problems", "samples", "greedy", "sampled")}


def _evaluation(plain: dict[str, Any] | None) -> Evaluation | None:
    return None if plain is None else Evaluation(**plain)
