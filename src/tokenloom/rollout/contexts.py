"""The state in which a model samples, and its exact restoration for the training that follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def sampling_mode(policy: Any) -> Iterator[None]:
    """Evaluation mode, no gradient, and one autocast region, for the whole of a decode.

    - Every module's own training flag is put back, not one flag for all. Evaluation mode also
      suspends gradient checkpointing, which would switch the key/value cache off.
    - Under autocast each weight is cast once per region and kept, but only weights that require a
      gradient; frozen ones (the base under LoRA) are marked so for the duration, or every step
      would cast the whole model again.
    - Those casts have no gradient and know nothing of later optimizer steps, so none may survive:
      a region ends by dropping them, unless the caller has one open around this; then they are
      dropped here, before and after.
    - `no_grad`, not `inference_mode`: tensors of the latter are refused by a later backward.
    """
    model = policy.model
    flags = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_leaf and p.dtype == torch.float32]
    model.eval()
    torch.clear_autocast_cache()
    try:
        with torch.no_grad(), policy.autocast():
            casts = torch.is_autocast_enabled(policy.device.type)
            for parameter in frozen if casts else ():
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
    finally:
        torch.clear_autocast_cache()
        for module, training in flags:
            module.training = training
