"""A constraint as a logits processor, for any sampler, draft or search that `generate` may use.

    ids = inputs["input_ids"]
    masks = Masks(constraint, ids.shape[1], [tokenizer.eos_token_id])
    out = model.generate(**inputs, logits_processor=[masks], max_new_tokens=64)
    standing(constraint, out[0, ids.shape[1] :].tolist(), masks.eos, limit=64)     # ("fulfilled", the ids)

What is drawn so is always allowed, but not the model's law given the constraint; for that there is the loop "awrs".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.constraints.protocol import allowed, describe, ending_with
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.locally_constrained import locally_constrained

# Where nothing may follow a row must end all the same. No search prefers that end to one that is allowed, and every
# floating-point format holds it.
_LAST_RESORT = -1e4

Standing = Literal["fulfilled", "unfinished", "failed"]
"""Of a response under a constraint: it is complete; it was cut and is a beginning of allowed text; nothing that the
model may say could follow it."""


class Masks(LogitsProcessor):
    """Scores [B, V] without the tokens that `constraint` forbids after the ids behind the first `prompt_length`.

    Where it forbids all, an end token is left, which `standing` tells from an allowed end. It belongs before other
    processors, so that top-k and the like count allowed tokens only.
    """

    def __init__(self, constraint: Any, prompt_length: int, eos: Collection[int]) -> None:
        """Raises ValueError for an object that is no constraint, or without an end token."""
        self.constraint = ending_with(constraint, eos)
        self.prompt_length, self.eos = prompt_length, frozenset(eos)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raises ValueError when no token that the model gives mass to may come first."""
        possible = scores > -torch.inf
        generated = input_ids[:, self.prompt_length :].tolist()
        keep = torch.stack([allowed(self.constraint, row, mass) for row, mass in zip(generated, possible, strict=True)])
        keep = keep.to(scores.device)
        stuck = ~keep.any(-1)
        if bool(stuck.any()):
            if input_ids.shape[1] <= self.prompt_length:
                raise ValueError(f"{describe(self.constraint)} allows no first token that the model gives mass to")
            end = min(self.eos)
            scores = wide(scores).clone()
            scores[stuck, end] = _LAST_RESORT
            keep[stuck, end] = True
        return locally_constrained(scores, keep)


def standing(constraint: Any, ids: Sequence[int], eos: Collection[int], *, limit: int) -> tuple[Standing, list[int]]:
    """How a response of at most `limit` tokens stands, and as much of it as the constraint allows.

    A failed one has weight 0: it stopped early, or what it has from some token on, be it the end, is not allowed and
    left out. One without an end is fulfilled where the end might have come.
    """
    judge = ending_with(constraint, eos)
    for place, token in enumerate(ids):
        if not judge.accept(ids[:place], token):
            return "failed", list(ids[:place])
    if any(i in eos for i in ids) or any(judge.accept(ids, end) for end in sorted(eos)):
        return "fulfilled", list(ids)
    return "unfinished" if len(ids) >= limit else "failed", list(ids)
