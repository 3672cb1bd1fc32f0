"""Low-rank adapters through PEFT: adding them, switching them off, merging them for saving."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from tokenloom.policy.config import LoraSection


def add_lora(model: Any, section: LoraSection, *, seed: int = 0) -> Any:
    """`model` wrapped by PEFT with fresh adapters: the update is zero at the start.

    Raises:
        ValueError: when the target modules do not exist or name the output head.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=section.rank,
        # PEFT divides by the rank; it states the numerator as an integer but computes with any number.
        lora_alpha=cast(int, section.scaling_alpha),
        lora_dropout=0.0,
        target_modules=section.target_modules,
        bias="none",
        # GPT-2's projections keep their weights transposed.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(
                f"lora.target_modules = {section.target_modules!r} does not fit {type(model).__name__}: "
                f"{error}. "
                'Name modules of the model, or use "all-linear"'
            ) from error
    if type(model.get_output_embeddings()).__module__.startswith("peft."):
        raise ValueError(
            f"lora.target_modules = {section.target_modules!r} includes the output head, which cannot "
            'be adapted: its weight is often tied to the embeddings. Leave the head out, or use "all-linear"'
        )
    return wrapped


def is_lora(model: Any) -> bool:
    """Whether PEFT wraps the model."""
    return type(model).__module__.startswith("peft.")


def adapters_off(model: Any) -> AbstractContextManager[None]:
    """While this is open, the model computes what it did before the adapters were added."""
    return cast("AbstractContextManager[None]", model.disable_adapter())


def merged_state(model: Any) -> dict[str, Tensor]:
    """Weights of the base model with the adapters added, under the base model's names.

    The model is untouched: merging in place and back would leave rounding errors in the base weights.
    """
    base = model.get_base_model()
    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight(adapter)
        for name, module in base.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
        for adapter in module.active_adapters
    }
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in base.state_dict().items():
            if ".lora_" in name:
                continue
            if name in deltas:
                weight = (weight.to(deltas[name].dtype) + deltas.pop(name)).to(weight.dtype)
            state[name.replace(".base_layer.", ".")] = weight
    return state
