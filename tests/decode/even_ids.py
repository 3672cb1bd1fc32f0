"""A small constraint on ids, and padded prompts of tiny models to try constraints on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": 8, "top_k": 0, "eos_token_id": 1, "pad_token_id": 0}


class Even:
    """Even ids only, each no smaller than the one before; the end after three."""

    name = "the constraint of even ids"

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """See `Constraint`."""
        if token == 1:
            return len(prefix) == 3
        return len(prefix) < 3 and token % 2 == 0 and (not prefix or token >= prefix[-1])
