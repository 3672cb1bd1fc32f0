"""The values that parts are called with, by vocabulary name, and the call itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenloom.composition import Bound
from tokenloom.masked import at_last_position, clamped_exp, masked_sum, where_mask
from tokenloom.parameters import signature_inputs


class Context:
    """Vocabulary names and their values during a plan or a loss.

    Every float [B, T] tensor is zeroed off the mask on entry, so parts never see hostile padding.
    """

    def __init__(self, values: Mapping[str, Any], mask: Tensor) -> None:
        self.values: dict[str, Any] = {"mask": mask}
        for name, value in values.items():
            self.put(name, value)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool."""
        mask: Tensor = self.values["mask"]
        return mask

    def put(self, name: str, value: Any) -> None:
        """Set a value; `None` leaves the name absent."""
        if value is None:
            return
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == self.mask.shape:
            mask = self.mask if value.ndim == 2 else self.mask[..., None]
            value = where_mask(value, mask)
        self.values[name] = value

    def put_rewards(self, value: Tensor) -> None:
        """Set `rewards` and `token_rewards` from either [B] or [B, T], keeping the two consistent.

        Raises:
            ValueError: for any other shape.
        """
        if not isinstance(value, Tensor) or value.shape not in (self.mask.shape, self.mask.shape[:1]):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"rewards must be [B] or [B, T] = {tuple(self.mask.shape)}, got {shape}")
        if value.ndim == 2:
            self.put("token_rewards", value)
            total = masked_sum(self.values["token_rewards"], self.mask, -1)
            # A row without sampled tokens has nowhere to hold its reward; its outcome stays known.
            self.values["rewards"] = torch.where(self.mask.any(-1), total, self.values.get("rewards", total))
        else:
            shift = value
            held = self.values.get("token_rewards", torch.zeros((), dtype=value.dtype, device=value.device))
            if "token_rewards" in self.values:
                # NaN minus NaN is NaN: where a part scored an unscorable row, its NaN tokens start from 0.
                rescued = self.values["rewards"].isnan() & ~value.isnan()
                held = torch.where(rescued[:, None] & held.isnan(), torch.zeros_like(held), held)
                shift = value - torch.where(rescued, held.sum(-1), self.values["rewards"])
            self.put("token_rewards", held + at_last_position(shift, self.mask))
            self.values["rewards"] = value

    def get(self, name: str) -> Any:
        """The value of a name, derived if need be, None when absent."""
        if name not in self.values and name == "ratio" and "log_ratio" in self.values:
            # Whoever asks first may stand under no_grad; a term that asks later still needs the gradient.
            with torch.enable_grad():
                self.values["ratio"] = clamped_exp(self.values["log_ratio"], self.mask)
        return self.values.get(name)

    def call(self, bound: Bound, state: Any = None) -> Any:
        """Call a part with what its signature names.

        Raises:
            ValueError: when a required input is absent.
        """
        step, total = self.values.get("step", 0), self.values.get("total_steps")
        arguments: dict[str, Any] = {}
        for name, required in bound.part.inputs.items():
            value = state if name == "state" else self.get(name)
            if value is not None or name in ("state", "total_steps"):
                arguments[name] = value
            elif required:
                raise ValueError(
                    f"part {bound.part.name!r} needs {name!r}, which is not there; "
                    f"present: {', '.join(sorted(k for k in self.values))}"
                )
        return bound.part.function(**arguments, **bound.at(step, total))

    def multiplier(self, bound: Bound) -> Tensor | None:
        """The closed-form multiplier of a surrogate at the current ratio, [B, T], or None if it states none."""
        if bound.part.multiplier is None:
            return None
        inputs, hyper = signature_inputs(bound.part.name, bound.part.multiplier)
        step, total = self.values.get("step", 0), self.values.get("total_steps")
        arguments = {n: self.get(n) for n in inputs if self.get(n) is not None}
        defaults = {k: h.default for k, h in bound.part.hyperparameters.items()}
        params = {k: v for k, v in (defaults | bound.at(step, total)).items() if k in hyper}
        value: Tensor = bound.part.multiplier(**arguments, **params)
        return value
