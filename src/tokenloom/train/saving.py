"""What a run saves of itself, how it goes on from there, and the model that it leaves behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenloom.policy import Policy
from tokenloom.train import checkpoint
from tokenloom.train.diagnosis import broken_weights, diagnosis
from tokenloom.train.dump import cut
from tokenloom.train.errors import TrainingDiverged
from tokenloom.train.evaluate import Evaluation

if TYPE_CHECKING:
    from tokenloom.train.loop import Trainer


def save_checkpoint(trainer: Trainer) -> None:
    """See `Trainer.save_checkpoint`."""
    run, policy = trainer.run, trainer.policy
    if broken_weights(policy):
        raise TrainingDiverged(diagnosis(f"after step {trainer.done} no checkpoint was written", policy, run.path))
    progress = {
        "data": trainer.stream.position,
        "problems": trainer.stream.fingerprint,
        "files": run.sizes(),
        "best": trainer.best,
        "bad_steps": trainer.bad_steps,
        "stopped": trainer.stopped,
        "before": _plain(trainer.before),
        "after": _plain(trainer.after),
    }
    checkpoint.save(
        run.path / "checkpoints",
        checkpoint.Checkpoint(
            step=trainer.done,
            weights=policy.state_dict(),
            optimizer=trainer.optimizer.state(),
            algorithm=trainer.state,
            progress=progress,
        ),
        keep=trainer.recipe.train.keep_checkpoints,
    )


def restore(trainer: Trainer) -> int:
    """See `Trainer.restore`."""
    run, message = trainer.run, trainer.observer.message
    folder = run.path / "checkpoints"
    found = checkpoint.load_newest(folder)
    cut(run.path, found.step if found else 0)
    if found is None:
        run.cut({})
        return 0
    checkpoint.tidy(folder, keep=trainer.recipe.train.keep_checkpoints)
    trainer.policy.load_state_dict(found.weights)
    trainer.optimizer.load(found.optimizer)
    trainer.state, trainer.done = found.algorithm, found.step
    progress = found.progress
    trainer.stream.restore(progress["data"])
    if progress["problems"] != trainer.stream.fingerprint:
        message("the training problems are not those that the run was begun with; on with the new")
    trainer.best, trainer.bad_steps, trainer.stopped = progress["best"], progress["bad_steps"], progress["stopped"]
    trainer.before, trainer.after = _evaluation(progress["before"]), _evaluation(progress["after"])
    for name in run.cut(progress["files"]):
        message(f"{name} is shorter than it was at the checkpoint; the lines that are gone stay gone")
    return trainer.done


def save_model(policy: Policy, run: Path) -> None:
    """Write `model/` of a run's folder, an ordinary Hugging Face folder, in one piece."""
    target, temporary = run / "model", run / ".model-writing"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save(temporary)
    checkpoint.flush(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)


def _plain(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {n: getattr(evaluation, n) for n in ("problems", "samples", "greedy", "sampled")}


def _evaluation(plain: dict[str, Any] | None) -> Evaluation | None:
    return None if plain is None else Evaluation(**plain)
