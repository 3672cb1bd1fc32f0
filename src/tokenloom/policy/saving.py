"""A policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tokenloom.policy import lora

VALUE_HEAD_FILE = "value_head.safetensors"


def save_policy(
    model: Any, tokenizer: Any, value_head: nn.Module | None, folder: Path, *, adapter_only: bool = False
) -> None:
    """Weights, config, generation config and tokenizer, such that `AutoModelForCausalLM` loads `folder`.

    Adapters are merged into the weights; `adapter_only` writes a PEFT adapter folder instead. The
    value head goes beside, in a file that `transformers` ignores.

    Raises:
        ValueError: for `adapter_only` without adapters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if lora.is_lora(model):
        if adapter_only:
            model.save_pretrained(folder)
        else:
            model.get_base_model().save_pretrained(folder, state_dict=lora.merged_state(model))
    elif adapter_only:
        raise ValueError("adapter_only needs a policy with LoRA; this one trains all weights: call save(folder)")
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if value_head is not None:
        from safetensors.torch import save_file

        state = {name: p.detach().cpu().contiguous() for name, p in value_head.state_dict().items()}
        save_file(state, folder / VALUE_HEAD_FILE)
