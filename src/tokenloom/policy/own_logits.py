"""A model's own way from the last hidden state to logits, whatever it does there.

Calling the model with its trunk replaced by given hidden states runs its head and everything that
follows (scales, soft-caps, things no config names) on just those rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def trunk_of(causal: nn.Module) -> nn.Module:
    """The part of a Hugging Face causal LM that ends with the last hidden state (after the final norm).

    Raises:
        ValueError: when the model does not tell which part that is, or also has an encoder.
    """
    if getattr(getattr(causal, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(causal).__name__} is an encoder-decoder, whose encoder would see the response beforehand: "
            "Tokenloom needs a decoder-only causal LM"
        )
    trunk = getattr(causal, "base_model", None)
    if not isinstance(trunk, nn.Module) or trunk is causal:
        raise ValueError(
            f"{type(causal).__name__} has no trunk separate from its head (its `base_model` is itself): "
            "Tokenloom reads hidden states before the head and needs a decoder-only causal LM"
        )
    return trunk


def run_trunk(trunk: nn.Module, tokens: Tensor, *, mask: Any = None, positions: Tensor | None = None) -> Tensor:
    """Last hidden states [B, S, D] for `tokens` [B, S]; see `interface.Trunk`."""
    given = {k: v for k, v in (("attention_mask", mask), ("position_ids", positions)) if v is not None}
    output = trunk(input_ids=tokens, use_cache=False, return_dict=True, **given)
    return cast(Tensor, output[0])


def own_logits(causal: nn.Module, hidden: Tensor) -> Tensor:
    """[N, V] logits that `causal` itself computes from hidden states [N, D], in its own format."""
    dummy = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
    with _trunk_returns(causal, hidden[None]):
        output = causal(input_ids=dummy, use_cache=False, return_dict=True)
    return cast(Tensor, output.logits[0])


@contextmanager
def _trunk_returns(causal: nn.Module, hidden: Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import MoeModelOutputWithPast

    trunk = trunk_of(causal)

    def bypass(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        output = MoeModelOutputWithPast(last_hidden_state=cast(Any, hidden))
        output.cross_attentions = None  # GPT-2 hands them on
        return output

    replaced = trunk.__dict__.get("forward")
    trunk.__dict__["forward"] = bypass
    try:
        yield
    finally:
        if replaced is None:
            del trunk.__dict__["forward"]
        else:
            trunk.__dict__["forward"] = replaced
