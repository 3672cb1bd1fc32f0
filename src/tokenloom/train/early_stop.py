"""Whether an evaluation ends a run before its last step."""

from __future__ import annotations

from tokenloom.train.config import EarlyStop
from tokenloom.train.evaluate import Evaluation


def reason_to_stop(rule: EarlyStop | None, evaluation: Evaluation, history: list[float]) -> str | None:
    """Why the run should stop after an evaluation, None to go on.

    `history` holds what the rule watches at each evaluation before this one, and gets the value of this one.
    """
    if rule is None:
        return None
    value = evaluation.greedy if rule.metric == "greedy" else evaluation.sampled
    if value is None:
        return None
    history.append(value)
    if rule.target is not None and value >= rule.target:
        return f"held-out {rule.metric} accuracy {value:.3f} reached {rule.target}"
    if rule.patience is not None and len(history) - 1 - history.index(max(history)) >= rule.patience:
        return f"no better {rule.metric} accuracy in {rule.patience} evaluations"
    return None
