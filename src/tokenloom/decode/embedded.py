"""What loops that feed embeddings share: input embeddings of tokens, laws at a temperature of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tokenloom.decode.session import ModelSession, Session

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What `generate` makes of temperature, top_k, top_p and min_p."""


def without_warpers(processors: Sequence[Any]) -> list[Any]:
    """The processors that are not temperature, top-k, top-p or min-p."""
    return [p for p in processors if not isinstance(p, WARPERS)]


def embedding_session(session: Session, method: str) -> ModelSession:
    """The session, checked to take embeddings.

    Raises:
        ValueError: when the model has none.
    """
    if not isinstance(session, ModelSession):
        raise ValueError(f"{method} feeds embeddings; {type(session).__name__} reads tokens only")
    return session


def embed(model: Any, ids: Tensor) -> Tensor:
    """Input embeddings [..., D] of ids [...], scaled as the model's own module scales them."""
    found: Tensor = model.get_input_embeddings()(ids)
    return found


def embedding_table(model: Any) -> Tensor:
    """The input embeddings [V, D] of the whole vocabulary."""
    module = model.get_input_embeddings()
    if type(module) is torch.nn.Embedding:
        return module.weight.detach()
    with torch.no_grad():
        found: Tensor = module(torch.arange(module.num_embeddings, device=module.weight.device))
    return found


def law_at(scores: Tensor, temperature: float) -> Tensor:
    """softmax(scores / temperature) [..., V], at least float32; at 0 all on the maximum, the lowest id among equals."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if temperature > 0:
        return (wide / temperature).softmax(-1)
    return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
