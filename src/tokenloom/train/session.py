"""`Session`: opens what a run needs and closes it again; `train` is the whole of it in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from tokenloom.policy import Policy
from tokenloom.policy.loading import pick_device
from tokenloom.tasks import Verifier, load_task
from tokenloom.train import checkpoint
from tokenloom.train.allocator import keep_freed_memory
from tokenloom.train.data import derive
from tokenloom.train.events import Observer, Observers
from tokenloom.train.loop import Outcome, Trainer
from tokenloom.train.optim import check_installed
from tokenloom.train.recipe import Recipe
from tokenloom.train.run import RunFolder


class Session:
    """Opens what a run needs (folder, task, verifiers, policy) and closes it again.

    Raises:
        ValueError: when the folder holds a run already and `resume` is not set, or its recipe differs and
            `force` is not set. With `force` the run goes on under the new recipe, which replaces the old one.
            Also when the recipe needs a package that is not installed.
    """

    def __init__(
        self, recipe: Recipe, run: str | Path, observers: list[Observer], *, resume: bool = False, force: bool = False
    ) -> None:
        self.recipe, self.observer, self.resume, self.force = recipe, Observers(observers), resume, force
        self.path = Path(run)

    def __enter__(self) -> Self:
        try:
            check_installed(self.recipe.train)
            self.run = RunFolder(self.path)
            begun = self.run.begun
            if begun and not self.resume:
                raise ValueError(
                    f"{str(self.path)!r} already holds a run. Continue it with `tokenloom train --resume {self.path}`, "
                    "or choose another folder"
                )
            changed = self.run.changed(self.recipe)
            if changed and not self.force:
                shown = "; ".join(f"{k}: {old!r} -> {new!r}" for k, (old, new) in changed.items())
                raise ValueError(f"the recipe differs from the one that {str(self.path)!r} was begun with: {shown}")
            checkpoint.seed_random_states(derive(self.recipe.train.seed, "global"))
            self.observer.message(f"loading the task {self.recipe.task.source or 'mixture'}")
            task = load_task(self.recipe.task)
            self.observer.message(task.report)
            if not begun:
                self.run.begin(self.recipe)
            self.verifier = Verifier(self.recipe.task)
            self.verifier.__enter__()
            self.observer.message(f"loading the model {self.recipe.model.name}")
            device = pick_device(None)
            seed = derive(self.recipe.train.seed, "adapters")
            policy = Policy.load(config=self.recipe.model, device=device, seed=seed)
            if device.type == "cpu":
                # Not before: what loading frees would lie below the optimizer's state for good.
                keep_freed_memory()
            self.trainer = Trainer(self.recipe, self.run, policy, task, self.verifier, self.observer)
            if self.resume:
                step = self.trainer.restore()
                if changed:
                    self.trainer.reconsider()
                    # Only now: a recipe that the checkpoint does not fit must not replace the one that it does.
                    self.run.begin(self.recipe)
                self.observer.message(f"resuming after step {step}" if step else "resuming from the beginning")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "verifier"):
            self.verifier.close()
        if hasattr(self, "run"):
            self.run.close()
        self.observer.close()


def train(recipe: Recipe, run: str | Path, observers: list[Observer] | None = None, *, resume: bool = False) -> Outcome:
    """Train as the recipe says, leaving everything in the folder `run`.

    Raises:
        ValueError: for a folder in use, a changed recipe, or a malformed task.
        TrainingDiverged: when three steps in a row had no finite loss or gradient.
    """
    with Session(recipe, run, observers or [], resume=resume) as session:
        return session.trainer.train()
