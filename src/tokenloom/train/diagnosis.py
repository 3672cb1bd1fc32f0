"""What is told of a run whose numbers stopped being numbers: where the damage is, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenloom.policy import Policy
from tokenloom.train import checkpoint
from tokenloom.train.errors import TrainingDiverged


def broken_weights(policy: Policy) -> list[str]:
    """The names of trainable weights that are not finite."""
    return [n for n, p in policy.trainable_parameters() if not bool(p.isfinite().all())]


def diagnosis(what: str, policy: Policy, run: Path) -> str:
    """What happened, what that says of the weights, the usual remedies, and where the run can go on from."""
    broken = broken_weights(policy)
    cause = (
        f"{len(broken)} weights are not finite, first {broken[0]!r}: an earlier update did the damage"
        if broken
        else "the weights are finite: the batch itself, or a part of the algorithm, gives what is not a number"
    )
    saved = checkpoint.steps(run / "checkpoints")
    back = f"its checkpoint of step {saved[-1]}" if saved else "its beginning"
    return (
        f"{what}. Now {cause}. Usual remedies: a lower train.learning_rate, a smaller train.max_grad_norm, "
        f"model.autocast=none instead of bf16. `tokenloom train --resume {run} KEY=VALUE` goes on from {back}"
    )


@contextmanager
def diagnosed(when: str, policy: Policy, run: Path) -> Iterator[None]:
    """Sampling from a model whose logits are not numbers ends the run with a diagnosis.

    Raises:
        TrainingDiverged: instead of a FloatingPointError inside.
    """
    try:
        yield
    except FloatingPointError as error:
        raise TrainingDiverged(diagnosis(f"{when}: {error}", policy, run)) from error
