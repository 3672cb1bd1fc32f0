"""Per-token quantities of a step as lines of tokens.jsonl, and a bad batch as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.plan import Plan
from tokenloom.policy import Policy
from tokenloom.signals import Signals
from tokenloom.train.collect import Collected


def token_lines(
    collected: Collected, plan: Plan, algorithm: Algorithm, policy: Policy, step: int, limit: int,
    state: dict[str, Any], total_steps: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One line per response, whole groups first, up to `limit`: ids, pieces, mask and what was done to each token.

    Signals are taken anew from the policy as it stood before the update, so this must run before it.
    """
    rollouts = collected.rollouts
    needs = sorted(algorithm.needs | algorithm.loss_needs | {"entropies"})
    signals = policy.signals(rollouts, needs)
    surroundings = {"step": step, "total_steps": total_steps}
    coefficients = algorithm.coefficients(rollouts, signals, state, **surroundings)["logprobs"]
    named: dict[str, torch.Tensor | None] = {
        "advantage": plan.values["advantages"],
        "coefficient": coefficients,
        "weight": plan.values["weights"],
        "entropy": signals.entropies,
        "logprob": signals.logprobs,
    }
    if signals.logprobs is not None and rollouts.sampler_logprobs is not None:
        named["log_ratio"] = signals.logprobs - rollouts.sampler_logprobs
    lines = []
    for row in range(min(len(rollouts), limit)):
        ids = rollouts.response(row).tolist()
        n = len(ids)
        lines.append(
            {
                "step": step + 1,
                "row": row,
                "group": int(rollouts.group_ids[row]),
                "prompt": collected.items[row].text,
                "answer": collected.items[row].answer,
                "reward": float(rollouts.rewards[row]) if rollouts.rewards is not None else None,
                "ids": ids,
                "pieces": [policy.tokenizer.decode([i]) for i in ids],
                "mask": rollouts.mask[row, :n].tolist(),
                "quantities": {k: v[row, :n].tolist() for k, v in named.items() if v is not None},
            }
        )
    return lines


def save_bad_batch(folder: Path, rollouts: Rollouts, signals: Signals, plan: Plan) -> Path:
    """Write what led to a non-finite loss or gradient, for a look at it; returns the folder."""
    rollouts.save(folder)
    tensors = {f"signals.{k}": v.detach().contiguous() for k, v in signals.named().items()}
    tensors |= {f"plan.{k}": v.contiguous() for k, v in plan.values.items() if isinstance(v, torch.Tensor)}
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "signals.safetensors")
    return folder
