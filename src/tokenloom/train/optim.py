"""AdamW, its learning-rate schedule, and its state as flat tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenloom.train.config import TrainConfig


class Optimizer:
    """AdamW over named parameters, with clipping; the learning rate is a function of the step alone."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self.config = config
        self.names = [n for n, _ in parameters]
        self.parameters = [p for _, p in parameters]
        try:
            self.adamw = self._adamw(fused=True)
        except RuntimeError:
            # Not every device and number format has the fused kernel; PyTorch says so when it is asked for.
            self.adamw = self._adamw(fused=None)

    def _adamw(self, *, fused: bool | None) -> torch.optim.AdamW:
        c = self.config
        return torch.optim.AdamW(
            self.parameters,
            lr=c.learning_rate,
            betas=c.betas,
            eps=c.adam_eps,
            weight_decay=c.weight_decay,
            fused=fused,
        )

    def step(self, step: int) -> float | None:
        """Clip, update and clear the gradients; returns the gradient's norm, or None when it is no number.

        With a non-finite gradient nothing is changed.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if math.isfinite(norm):
            limit = self.config.max_grad_norm
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, torch.tensor(norm))
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate(step)
            self.adamw.step()
        self.clear()
        return norm if math.isfinite(norm) else None

    def clear(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def learning_rate(self, step: int) -> float:
        """The rate at a 0-based step: linear warm-up, then the schedule down to `final_fraction` of the peak."""
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / (c.warmup_steps + 1)
        span = max(c.steps - 1 - c.warmup_steps, 1)
        x = min((step - c.warmup_steps) / span, 1.0)
        if c.schedule == "constant":
            return c.learning_rate
        fall = x if c.schedule == "linear" else (1 - math.cos(math.pi * x)) / 2
        return c.learning_rate * (1 - (1 - c.final_fraction) * fall)

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by parameter name."""
        named = zip(self.names, self.parameters, strict=True)
        return {
            f"{key}/{name}": value.detach()
            for name, parameter in named
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: when it is the state of other parameters.
        """
        by_name = dict(zip(self.names, self.parameters, strict=True))
        unknown = {k.split("/", 1)[1] for k in state} - set(by_name)
        if unknown:
            raise ValueError(f"the optimizer state is of other parameters: {sorted(unknown)[:3]}")
        for key, value in state.items():
            kind, name = key.split("/", 1)
            parameter = by_name[name]
            # The fused kernel counts steps where the parameter is, the others on the CPU.
            here = kind != "step" or self.adamw.defaults["fused"]
            self.adamw.state[parameter][kind] = value.to(parameter.device if here else "cpu", copy=True)
