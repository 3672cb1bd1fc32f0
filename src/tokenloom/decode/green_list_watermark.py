"""The green-list watermark as a logits processor; sets, scores and detection are in its rules.

Detection needs the ids and the width of the model's scores: `methods.decoding.green_list_watermark.detect`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.green_list_watermark import green_ids, green_list_watermark


@decoder("green-list-watermark", kind="shaper")
class GreenListWatermark(LogitsProcessor):
    """Raises a green set of tokens that `key` and the last `context` tokens choose, the same that `detect` counts."""

    def __init__(self, *, delta: float = 2.0, gamma: float = 0.25, key: int = 15485863, context: int = 1) -> None:
        """See the class.

        Raises:
            ValueError: for a negative delta, gamma outside (0, 1), or a context below 1.
        """
        if not delta >= 0 or not 0 < gamma < 1 or context < 1:
            raise ValueError(
                "green-list-watermark: delta must be 0 or more, gamma in (0, 1) and context 1 or more, got "
                f"{delta}, {gamma} and {context}"
            )
        self._delta, self._gamma, self._key, self._context = delta, gamma, key, context

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]; texts shorter than the context are left alone."""
        if input_ids.shape[1] < self._context:
            return scores
        green = torch.zeros(scores.shape, dtype=torch.bool)
        for row, before in enumerate(input_ids[:, -self._context :].tolist()):
            ids = green_ids(before, scores.shape[-1], gamma=self._gamma, key=self._key, context=self._context)
            green[row].index_fill_(0, ids, True)
        return green_list_watermark(wide(scores), green.to(scores.device), delta=self._delta).to(scores.dtype)
