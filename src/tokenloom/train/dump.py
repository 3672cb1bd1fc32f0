"""Per-token quantities of a step as lines of tokens.jsonl, what they were computed from, and a bad batch as files.

tokens/step-000010/   rollouts.* (`Rollouts.load`), signals.safetensors, state.safetensors and batch.json of the
                      dumped rows, so that another algorithm can be asked what it would have done with them
A folder appears in one move and before the lines of its step; `cut` takes away what a resumed run will write again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
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
from tokenloom.train.checkpoint import flush, pack
from tokenloom.train.collect import Collected

FOLDER = "tokens"
MAX_WIDTH = 64
"""Numbers per token up to which a signal is stored: hidden states would make a dump larger than a checkpoint."""
_NAME, _WRITING = re.compile(r"step-(\d{6,})"), ".writing-"


def token_lines(
    collected: Collected, plan: Plan, algorithm: Algorithm, policy: Policy, limit: int, state: Mapping[str, Any],
    *, step: int, total_steps: int, generator: torch.Generator, run: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One line per response, whole groups, up to `limit` rows: ids, pieces, mask and what was done to each token.

    Signals are taken anew from the policy as it stood before the update, so this must run before it. `state` and
    `generator` are what the step's plan was made with, so that parts that draw draw the same. With `run`, the rows
    and their signals are stored under `run / "tokens"` first, and each line names their folder as `stored`.
    """
    rollouts = collected.rollouts
    needs = sorted(algorithm.needs | algorithm.loss_needs | {"entropies"})
    signals = policy.signals(rollouts, needs)
    coefficients = algorithm.coefficients(
        rollouts, signals, state, step=step, total_steps=total_steps, generator=generator
    )["logprobs"]
    named = quantities(plan, signals, coefficients, rollouts.sampler_logprobs)
    count = _whole_groups(rollouts.group_ids.tolist(), limit)
    place = {}
    if run is not None and count:
        about = {"step": step, "total_steps": total_steps, "batch_rows": len(rollouts)}
        folder = store(run, rollouts.rows(range(count)), signals.rows(range(count)), state, about)
        place = {"stored": folder.relative_to(run).as_posix()}
    lines = []
    for row in range(count):
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
                **place,
                "ids": ids,
                "pieces": [policy.tokenizer.decode([i]) for i in ids],
                "mask": rollouts.mask[row, :n].tolist(),
                "quantities": {k: v[row, :n].tolist() for k, v in named.items()},
            }
        )
    return lines


def quantities(
    plan: Plan, signals: Signals, coefficients: Tensor, sampler_logprobs: Tensor | None
) -> dict[str, Tensor]:
    """What is told of each token, [B, T] by name; a quantity whose signals are not there is left out.

    `log_ratio` is the trainer's log-prob less the sampler's; `kl` the estimate exp(d) - 1 - d of the KL divergence from
    the reference, with d = ref_logprobs - logprobs.
    """
    logprobs, reference = signals.logprobs, signals.ref_logprobs
    named: dict[str, Tensor | None] = {
        "advantage": plan.values["advantages"],
        "coefficient": coefficients,
        "weight": plan.values["weights"],
        "entropy": signals.entropies,
        "logprob": logprobs,
    }
    if logprobs is not None and sampler_logprobs is not None:
        named["log_ratio"] = logprobs - sampler_logprobs
    if logprobs is not None and reference is not None:
        named["reference_kl"] = torch.expm1(reference - logprobs) - (reference - logprobs)
    return {k: v for k, v in named.items() if v is not None}


def store(run: Path, rollouts: Rollouts, signals: Signals, state: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write rows and what an algorithm reads beside them; returns the folder, which appears in one move.

    `about` holds `step` (from 0), `total_steps` and `batch_rows`, the rows of the batch that these were part of.
    """
    parent = run / FOLDER
    target = parent / f"step-{about['step'] + 1:06d}"
    temporary = parent / f"{_WRITING}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    rollouts.save(temporary)
    kept = {k: v for k, v in signals.named().items() if v.ndim == 2 or v.shape[2:].numel() <= MAX_WIDTH}
    save_file({k: _owned(v) for k, v in kept.items()}, temporary / "signals.safetensors")
    tensors, plain = pack(state)
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "batch.json").write_text(json.dumps({**about, "state": plain}), encoding="utf-8")
    flush(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def cut(run: Path, step: int) -> None:
    """Remove the stored batches of steps after `step`, and what a kill left half-written."""
    parent = run / FOLDER
    for folder in list(parent.iterdir()) if parent.is_dir() else []:
        found = _NAME.fullmatch(folder.name)
        if folder.name.startswith(_WRITING) or (found and int(found.group(1)) > step):
            shutil.rmtree(folder)


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
    save_file({k: _owned(v) for k, v in tensors.items()}, folder / "signals.safetensors")
    return folder


def _owned(x: Tensor) -> Tensor:
    # Cloned, because safetensors refuses tensors that share memory.
    return x.detach().clone(memory_format=torch.contiguous_format)
