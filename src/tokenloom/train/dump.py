"""Per-token quantities of a step as lines of tokens.jsonl, and a bad batch as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.plan import Plan
from tokenloom.policy import Policy
from tokenloom.signals import Signals
from tokenloom.train.collect import Collected


def token_lines(
    collected: Collected, plan: Plan, algorithm: Algorithm, policy: Policy, limit: int, state: Mapping[str, Any],
    *, step: int, total_steps: int, generator: torch.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    """One line per response, whole groups, up to `limit` rows: ids, pieces, mask and what was done to each token.

    Signals are taken anew from the policy as it stood before the update, so this must run before it. `state` and
    `generator` are what the step's plan was made with, so that parts that draw draw the same.
    """
    rollouts = collected.rollouts
    needs = sorted(algorithm.needs | algorithm.loss_needs | {"entropies"})
    signals = policy.signals(rollouts, needs)
    coefficients = algorithm.coefficients(
        rollouts, signals, state, step=step, total_steps=total_steps, generator=generator
    )["logprobs"]
    named: dict[str, Tensor | None] = {
        "advantage": plan.values["advantages"],
        "coefficient": coefficients,
        "weight": plan.values["weights"],
        "entropy": signals.entropies,
        "logprob": signals.logprobs,
    }
    if signals.logprobs is not None and rollouts.sampler_logprobs is not None:
        named["log_ratio"] = signals.logprobs - rollouts.sampler_logprobs
    lines = []
    for row in range(_whole_groups(rollouts.group_ids.tolist(), limit)):
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


def _whole_groups(group_ids: list[int], limit: int) -> int:
    """How many leading rows make whole groups of at most `limit` rows; `limit` itself if the first group is larger."""
    ends = [i for i in range(1, len(group_ids) + 1) if i == len(group_ids) or group_ids[i] != group_ids[i - 1]]
    return max((end for end in ends if end <= limit), default=min(limit, len(group_ids)))


def save_bad_batch(folder: Path, rollouts: Rollouts, signals: Signals, plan: Plan, rows: Tensor) -> Path:
    """Write what led to a non-finite loss or gradient, for a look at it; returns the folder.

    `Rollouts.load(folder)` reads the step's whole batch back. signals.safetensors holds `signals.*`, those of the
    last micro-batch, `rows` [m], the batch's rows that they speak of, and `plan.*`, which speaks of all rows.
    """
    rollouts.save(folder)
    tensors = {f"signals.{k}": v for k, v in signals.named().items()} | {"rows": rows}
    tensors |= {f"plan.{k}": v for k, v in plan.values.items() if isinstance(v, Tensor)}
    owned = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(owned, folder / "signals.safetensors")
    return folder
