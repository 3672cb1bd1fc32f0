"""The line of metrics.jsonl that a training step leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenloom.masked import masked_mean
from tokenloom.plan import Plan
from tokenloom.train.collect import Collected


def step_record(
    step: int,
    collected: Collected,
    plan: Plan,
    measured: Mapping[str, float],
    *,
    learning_rate: float,
    grad_norms: Sequence[float],
    skipped: int,
    refill: bool,
) -> dict[str, Any]:
    """The metrics of step `step` (from 0) by name; docs/metrics.md says what each means.

    Args:
        measured: what the losses of the step measured.
        grad_norms: of the updates that were made; `skipped` counts those that were not.
        refill: whether dropped groups were replaced, which took rounds.
    """
    rollouts = collected.rollouts
    record: dict[str, Any] = {
        "step": step + 1,
        "kind": "train",
        "reward": collected.first_reward,
        "accuracy": collected.first_accuracy,
        "response_length": float(rollouts.lengths.float().mean()),
        "lr": learning_rate,
        "loss": measured.get("loss", 0.0),
        "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else 0.0,
    }
    if rollouts.sampler_logprobs is not None:
        # On policy the mean of -log pi(sampled token) estimates the entropy without another pass.
        record["entropy"] = -float(masked_mean(rollouts.sampler_logprobs, rollouts.mask))
    if rollouts.truncated is not None:
        record["truncated"] = float(rollouts.truncated.float().mean())
    if refill:
        record |= {"sampling/rounds": collected.rounds, "sampling/groups": collected.sampled_groups}
    for name, values in rollouts.reward_components.items():
        if len(rollouts.reward_components) > 1:
            record[f"reward/{name}"] = float(values.nanmean())
    record |= {"verifier_errors": collected.errors} if collected.errors else {}
    record |= {"skipped_updates": skipped} if skipped else {}
    return record | {f"plan/{k}": v for k, v in plan.metrics.items()} | dict(measured)
