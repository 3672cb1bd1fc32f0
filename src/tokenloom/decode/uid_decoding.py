"""UID decoding as a loop: beams that are scored by evenness of information as well as by probability.

model.generate(**inputs, custom_generate=decode.loop("uid-decoding", regularizer="square", lam=0.5, beams=10))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.decode.beam_search import Beams
from tokenloom.decode.registry import decoder
from tokenloom.decode.segment_search import Hypothesis
from tokenloom.methods.decoding.beam_search import EarlyStopping
from tokenloom.methods.decoding.uid_decoding import MONOTONE, Regularizer, next_objectives


@decoder("uid-decoding", kind="loop")
class UidDecoding(Beams):
    """Beam search for `sum log p - lam R`, R one of the regularizers "greedy", "variance", "local-variance", ...

    `length_penalty=1` divides the objective of a finished text by its length. An objective with a variance can rise
    again, so only `early_stopping=True` ends such a search before its beams end.
    """

    name = "uid-decoding"

    def __init__(
        self,
        *,
        regularizer: Regularizer = "variance",
        lam: float = 1.0,
        beams: int = 5,
        length_penalty: float = 0.0,
        early_stopping: EarlyStopping = "never",
        returned: int = 1,
    ) -> None:
        """Raises ValueError for an unknown regularizer, a negative lam, or as `Beams`."""
        known = ("greedy", "variance", "local-variance", "max", "square")
        if regularizer not in known:
            raise ValueError(f"uid-decoding: regularizer is one of {', '.join(known)}; got {regularizer!r}")
        if not 0 <= lam < math.inf:
            raise ValueError(f"uid-decoding: lam = {lam}; it is finite, and below 0 it would reward uneven text")
        super().__init__(beams, length_penalty, early_stopping, returned)
        self.regularizer, self.lam = regularizer, lam
        self.monotone = lam == 0 or regularizer in MONOTONE

    def totals(self, live: list[Hypothesis], logprobs: Tensor) -> Tensor:
        """See `Beams`."""
        rows = []
        for h, following in zip(live, -logprobs, strict=True):
            surprisals, least = -following.new_tensor(h.logprobs), -following.new_tensor(h.notes)
            rows.append(next_objectives(surprisals, least, following, regularizer=self.regularizer, lam=self.lam))
        return torch.stack(rows)
