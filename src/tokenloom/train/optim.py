"""The optimizer: AdamW with clipping, a learning-rate schedule, and its state as flat tensors.

Parameters are updated one after the other, and each gradient is freed as soon as it is used: no temporary is larger
than a parameter, and no gradient outlives its update. Clipping needs the norm of the whole gradient, so it comes first.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tokenloom.train.config import TrainConfig
from tokenloom.train.optim_moments import AdamMoments


class Moments(Protocol):
    """What AdamW remembers about each named parameter, in one format, and the update with it."""

    def update(self, name: str, gradient: Tensor, rate: float) -> None:
        """Move the parameter by one step at learning rate `rate`."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by `kind/name`."""

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy back what `state` gave for one parameter, by kind."""


class Optimizer:
    """AdamW over named parameters, with clipping; the learning rate is a function of the step alone.

    Raises:
        ValueError: when `config.optimizer_states` needs a package that is not installed.
    """

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self.config = config
        self.parameters = dict(parameters)
        check_installed(config)
        self.moments = _moments(self.parameters, config)

    def step(self, step: int) -> float | None:
        """Clip, update and clear the gradients; returns the gradient's norm, or None when it is no number.

        With a non-finite gradient nothing is changed.
        """
        norm = self._norm()
        if math.isfinite(norm):
            scale, rate = self._scale(norm), self.learning_rate(step)
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    if scale != 1.0:
                        parameter.grad.mul_(scale)
                    self.moments.update(name, parameter.grad, rate)
                    parameter.grad = None
        self.clear()
        return norm if math.isfinite(norm) else None

    def _norm(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def _scale(self, norm: float) -> float:
        """What gradients are multiplied by, in float32 as `torch.nn.utils.clip_grads_with_norm_` has it."""
        limit = self.config.max_grad_norm
        return 1.0 if limit is None else float((limit / (torch.tensor(norm) + 1e-6)).clamp(max=1.0))

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

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
        """Moments and counters by `kind/name` of the parameter."""
        return self.moments.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: when it is the state of other parameters, or in another format.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            by_name.setdefault(name, {})[kind] = value
        unknown = sorted(by_name.keys() - self.parameters.keys())
        if unknown:
            raise ValueError(f"the optimizer state is of other parameters: {unknown[:3]}")
        found, wanted = _format(state), self.config.optimizer_states
        if state and found != wanted:
            raise ValueError(
                f"the optimizer state was saved in {found}, the recipe says train.optimizer_states = {wanted}; "
                f"go on with train.optimizer_states={found}, or begin a new run"
            )
        for name, own in by_name.items():
            self.moments.load(name, own)


def check_installed(config: TrainConfig) -> None:
    """Whether the library behind `config.optimizer_states` is there.

    Raises:
        ValueError: naming the command that installs it.
    """
    if config.optimizer_states == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "train.optimizer_states = int8 needs the package bitsandbytes, which is not installed; install it with: "
            "python -m pip install 'tokenloom[lowmem]', or use bfloat16, which needs nothing"
        )


def _moments(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Moments:
    if config.optimizer_states == "int8":
        from tokenloom.train.optim_int8 import Int8Moments

        return Int8Moments(parameters, config)
    return AdamMoments(parameters, config, getattr(torch, config.optimizer_states))


def _format(state: Mapping[str, Tensor]) -> str:
    """The `optimizer_states` that a saved state was written under."""
    formats = {key.split("/", 1)[0]: value.dtype for key, value in state.items()}
    if "exp_avg" not in formats:
        return "int8"
    return "bfloat16" if formats["exp_avg"] == torch.bfloat16 else "float32"
