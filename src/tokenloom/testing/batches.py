"""What the laws try parts on: a batch with everything in it, a value for every vocabulary name, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts, Sampling
from tokenloom.catalog import Part
from tokenloom.masked import valid_positions
from tokenloom.planning import plan_context
from tokenloom.signals import Signals, signal_example, signal_names


def random_batch(
    seed: int = 0, *, rows: int = 9, width: int = 6, dtype: torch.dtype = torch.float64, spread: float = 0.5
) -> tuple[Rollouts, Signals]:
    """A batch with everything in it: ragged lengths, scattered groups of several sizes, one of them constant, tool
    tokens, an empty row; log-ratios within ±3 `spread`."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype)

    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[rows // 2] = 0
    lengths[0] = width
    mask = valid_positions(lengths, width) & (torch.rand(rows, width, generator=g) > 0.15)
    mask[:, 0] = lengths > 0
    group_ids = torch.tensor([7, 2, 7, 2, 40, 7, 2, 3, 3])[torch.arange(rows) % 9]
    rewards = torch.randint(0, 3, (rows,), generator=g).to(dtype) / 2
    rewards[group_ids == 3] = 0.1
    rollouts = Rollouts(
        prompt_tokens=tuple(torch.arange(3) for _ in range(rows)),
        tokens=torch.randint(0, 9, (rows, width), generator=g),
        lengths=lengths,
        mask=mask,
        group_ids=group_ids,
        rewards=rewards,
        truncated=torch.rand(rows, generator=g) < 0.3,
        answers=tuple(str(i % 3) for i in range(rows)),
        prompts=tuple({"difficulty": int(i)} for i in group_ids),
        sampler_logprobs=-2 * uniform(rows, width),
        sampling=Sampling(max_tokens=width + 2),
        policy_version=torch.zeros(rows, dtype=torch.int64),
        extras={
            "reference_rewards": torch.randint(0, 3, (rows,), generator=g).to(dtype) / 2,
            "answer_mask": mask & (torch.arange(width) >= lengths[:, None] - 2),
        },
    )
    logprobs = -2 * uniform(rows, width) - 0.05
    noise = torch.randn(rows, width, generator=g, dtype=dtype).clamp(-3, 3)
    signals = Signals(
        logprobs=logprobs,
        old_logprobs=logprobs - spread * noise,
        ref_logprobs=logprobs + 0.3 * torch.randn(rows, width, generator=g, dtype=dtype),
        entropies=2 * uniform(rows, width),
        values=uniform(rows, width),
        old_values=uniform(rows, width),
        extras={name: signal_example(name, rows, width, g).to(dtype) for name in signal_names()},
    )
    return rollouts, signals


def vocabulary_values(rollouts: Rollouts, signals: Signals, *, seed: int = 0) -> dict[str, Any]:
    """Every vocabulary name with a value that fits the batch."""
    ctx = plan_context(rollouts, signals, 3, 10, None)
    g = torch.Generator().manual_seed(seed)
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    noise = torch.randn(rollouts.mask.shape, generator=g, dtype=signals.logprobs.dtype)
    log_ratio = signals.logprobs - signals.old_logprobs
    values = dict(ctx.values) | signals.named()
    if signals.values is not None:
        values["values"] = signals.values
    values |= {
        "advantages": noise,
        "returns": noise.roll(1, 0),
        "blend_advantages": noise.roll(2, 0),
        "normalized_entropies": noise.clamp(-1, 1),
        "blend": torch.full_like(noise, 0.25),
        "weights": noise.abs(),
        "keep": torch.ones(len(rollouts), dtype=torch.bool),
        "log_ratio": log_ratio,
        "ratio": log_ratio.exp(),
        "lo": 0.8,
        "hi": 1.2,
        "cap": 3.0,
        "sampler_logprobs": rollouts.sampler_logprobs,
        "logits": torch.randn(len(rollouts), 11, generator=g),
        "generator": torch.Generator().manual_seed(seed),
        "state": None,
    }
    return values


def evaluate(part: Part, values: dict[str, Any]) -> Any:
    """Call a part with the values its signature names; the result without state, or by the stage's name for a dict."""
    arguments = {n: values.get(n) for n in part.inputs}
    if "generator" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(5)
    result = part.function(**arguments)
    if "state" in part.inputs and part.stage != "sampling":
        result = result[0]
    return result[_RESULTS[part.stage]] if isinstance(result, dict) and part.stage != "metric" else result


_RESULTS = {
    "reward": "rewards",
    "advantage": "advantages",
    "select": "keep",
    "credit": "advantages",
    "weight": "weights",
    "updates": "rows",
    "blend": "blend",
}
