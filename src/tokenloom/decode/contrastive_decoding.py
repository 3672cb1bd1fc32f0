"""Contrastive decoding as a logits processor; the formula is in `methods.decoding.contrastive_decoding`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, aligned
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.contrastive_decoding import contrastive_decoding


@decoder("contrastive-decoding", kind="shaper")
class ContrastiveDecoding(LogitsProcessor):
    """Scores of the decoded model against those of `amateur`, a weaker model with the same tokenizer."""

    def __init__(
        self,
        amateur: Any,
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        form: Literal["original", "later"] = "original",
        amateur_temperature: float = 1.0,
    ) -> None:
        """See the class.

        Raises:
            ValueError: for parameters that cannot be.
        """
        self.aux = Aux(amateur)
        self._options: dict[str, Any] = {
            "alpha": alpha, "beta": beta, "form": form, "amateur_temperature": amateur_temperature,
        }  # fmt: skip
        contrastive_decoding(torch.zeros(1, 1), torch.zeros(1, 1), **self._options)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]."""
        amateur = aligned(self.aux.next(input_ids), scores.shape[-1])
        return contrastive_decoding(wide(scores), amateur, **self._options).to(scores.dtype)
