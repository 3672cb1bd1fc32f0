"""What the method tests share: small builders for hand-worked numbers and one seeded batch with everything in it.

On `synthetic_batch` every preset's coefficients differ from GRPO's somewhere (`test_presets.py`), so a preset that
silently became another one would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.catalog import get_part, get_preset
from tokenloom.signals import SIGNAL_NAMES, Signals, signal_example, signal_names

NAN = float("nan")
INF = float("inf")


def ones(rows: int, width: int = 1) -> Tensor:
    """A mask [rows, width] without holes."""
    return torch.ones(rows, width, dtype=torch.bool)


def row(*values: float) -> Tensor:
    """One row [1, T] of float64."""
    return torch.tensor([values], dtype=torch.float64)


def vector(*values: float) -> Tensor:
    """[B] of float64."""
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Tensor | Sequence[Any] | float, tolerance: float = 1e-9) -> None:
    """Assert that two tensors agree; numbers worked by hand come with the tolerance of their digits."""
    wanted = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found.detach(), wanted.expand(found.shape), rtol=tolerance, atol=tolerance)


def gradient(objective: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
    """d sum(objective(*leaves)) / d leaves, zeros where there is no path."""
    alive = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = objective(*alive).sum()
    found = torch.autograd.grad(out, alive, allow_unused=True)
    return tuple(torch.zeros_like(a) if g is None else g for a, g in zip(alive, found, strict=True))


def defaults(name: str) -> dict[str, Any]:
    """The hyperparameters of a part with their defaults."""
    return {k: h.default for k, h in get_part(name).hyperparameters.items()}


def preset_defaults(slug: str) -> dict[str, Any]:
    """The parameters of a preset with their defaults."""
    return {k: h.default for k, h in get_preset(slug).parameters.items()}


def make(slug: str, **parameters: Any) -> Algorithm:
    """A preset with parameters, checked as a recipe's are."""
    return Algorithm.from_recipe({"preset": slug, **parameters})


def rollouts_of(
    rewards: Sequence[float],
    groups: Sequence[int] | None = None,
    mask: Sequence[Sequence[int]] | None = None,
    **rest: Any,
) -> Rollouts:
    """Float64 rollouts; without `mask` every response is one token long. `max_tokens` is the width."""
    number = len(rewards)
    m = torch.tensor(mask, dtype=torch.bool) if mask is not None else ones(number)
    width = m.shape[1]
    positions = torch.arange(1, width + 1) * m
    return Rollouts(
        prompt_tokens=tuple(torch.arange(2) for _ in range(number)),
        tokens=torch.zeros(number, width, dtype=torch.int64),
        lengths=positions.amax(-1) if width else torch.zeros(number, dtype=torch.int64),
        mask=m,
        group_ids=torch.tensor(groups if groups is not None else [0] * number),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        **{"sampling": Sampling(max_tokens=width)} | rest,
    )


def signals_from(named: dict[str, Tensor]) -> Signals:
    """Signals from values by name, registered ones among them."""
    own = {n: v for n, v in named.items() if n in SIGNAL_NAMES}
    return Signals(**own, extras={n: v for n, v in named.items() if n not in SIGNAL_NAMES})


def signals_of(rollouts: Rollouts, log_ratio: Any = 0.0, **rest: Tensor) -> Signals:
    """Signals with log-prob -1 everywhere and the given log-ratio to the old policy."""
    shape = rollouts.mask.shape
    logprobs = torch.full(shape, -1.0, dtype=torch.float64)
    old = logprobs - torch.as_tensor(log_ratio, dtype=torch.float64).expand(shape)
    return Signals(logprobs=logprobs, old_logprobs=old).replace(**rest)


def advantages_of(algorithm: Algorithm, rollouts: Rollouts, signals: Signals | None = None, **rest: Any) -> Tensor:
    """The advantages [B, T] of a plan."""
    plan = algorithm.plan(rollouts, signals or signals_of(rollouts), **rest)
    found: Tensor = plan.values["advantages"]
    return found


def coefficients_of(algorithm: Algorithm, rollouts: Rollouts, signals: Signals | None = None, **rest: Any) -> Tensor:
    """-d loss / d logprobs, [B, T]."""
    return algorithm.coefficients(rollouts, signals or signals_of(rollouts), **rest)["logprobs"]


def loss_of(algorithm: Algorithm, rollouts: Rollouts, signals: Signals | None = None, **rest: Any) -> Tensor:
    """The loss (scalar) with all rows in one update."""
    signals = signals or signals_of(rollouts)
    plan = algorithm.plan(rollouts, signals, one_update=True, **rest)
    total = torch.zeros((), dtype=torch.float64)
    for update in plan.updates:
        total = total + algorithm.loss(signals.rows(update.rows), update)[0]
    return total


def synthetic_batch(dtype: torch.dtype = torch.float64) -> tuple[Rollouts, Signals]:
    """12 rows of at most 8 tokens in three scattered groups (one of them constant): ragged lengths, tool output in the
    middle, a row without sampled tokens, one without a reward, two cut by length, off-policy ratios beyond every clip,
    a sampler that disagrees, a reference, a critic."""
    g = torch.Generator().manual_seed(20)
    rows, width = 12, 8

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, width, generator=g, dtype=dtype)

    lengths = torch.tensor([8, 3, 5, 8, 1, 6, 4, 0, 7, 2, 8, 5])
    mask = torch.arange(width)[None] < lengths[:, None]
    mask[0, 3:5] = False
    mask[5, 2] = False
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.0, NAN, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=dtype)
    group_ids = torch.tensor([4, 9, 4, 9, 2, 4, 9, 4, 9, 2, 4, 2])
    logprobs = -normal().abs() * 2 - 0.02
    logprobs[2, 1] = -9.0
    rollouts = Rollouts(
        prompt_tokens=tuple(torch.arange(3) for _ in range(rows)),
        tokens=torch.randint(0, 50, (rows, width), generator=g),
        lengths=lengths,
        mask=mask,
        group_ids=group_ids,
        rewards=rewards,
        truncated=lengths == width,
        sampler_logprobs=logprobs + normal(0.5),
        sampling=Sampling(max_tokens=8),
        answers=("7", "3", "3", None, "7", "5", "3", "4", "4", "7", " 5", None),
        prompts=tuple({"difficulty": int(i)} for i in group_ids),
        extras={
            "reference_rewards": torch.tensor([0.0, 1.0] * 6, dtype=dtype),
            "answer_mask": mask & (torch.arange(width) >= lengths[:, None] - 2),
        },
    )
    signals = Signals(
        logprobs=logprobs,
        old_logprobs=logprobs - normal(0.4),
        ref_logprobs=logprobs + normal(0.3),
        entropies=normal().abs(),
        values=normal(0.3) + 0.5,
        old_values=normal(0.3) + 0.5,
        extras={name: signal_example(name, rows, width, g).to(dtype) for name in signal_names()},
    )
    return rollouts, signals
