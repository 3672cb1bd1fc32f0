"""CNTP: look further ahead the less certain the next token is (arXiv 2507.03038).

H      entropy of the processed law of the next token, nats
n      n_min + floor((n_max - n_min) clip((H - h_lo) / (h_hi - h_lo), 0, 1))   trials
trial  tokens drawn up to a punctuation mark
choice the trial of the largest mean log-prob of its own tokens, processed law; the first among equals

Limits: h_lo = inf is plain sampling. Deviations: none from the paper's loop; the batched variant of the release,
which averages over what a trial samples beyond its end, is not followed. Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part

PUNCTUATION = frozenset(".,\n?!:;)]}")
"""What ends a trial."""


@part("cntp", stage="search", scope="row", paper="arXiv:2507.03038")
def trials(entropies: Tensor, *, n_min: int = 1, n_max: int = 10, h_lo: float = 0.01, h_hi: float = 1.5) -> Tensor:
    """How many trials [N], int64, follow laws of these `entropies` [N] (nats).

    Raises:
        ValueError: unless 1 <= n_min <= n_max, and for h_hi < h_lo with a finite h_lo.
    """
    if not 1 <= n_min <= n_max:
        raise ValueError(f"cntp: trials need 1 <= n_min <= n_max, got n_min={n_min}, n_max={n_max}")
    if h_lo == float("inf"):
        return torch.full_like(entropies, n_min, dtype=torch.int64)
    if h_hi < h_lo:
        raise ValueError(f"cntp: h_hi = {h_hi} lies below h_lo = {h_lo}; exchange them")
    entropies = entropies.double()
    # Bounds that coincide make a step; a width of 0 would give 0 / 0 at it.
    share = (entropies - h_lo) / (h_hi - h_lo) if h_hi > h_lo else (entropies >= h_hi).double()
    return n_min + ((n_max - n_min) * share.clamp(0, 1)).floor().long()


@part("cntp/choice", stage="rank", scope="group", paper="arXiv:2507.03038")
def most_confident(logprobs: Sequence[Sequence[float]]) -> int:
    """Index of the first trial of the largest mean of its tokens' `logprobs`, one token at least.

    Raises:
        ValueError: when there is no trial, or one without tokens.
    """
    if len(logprobs) == 0 or any(len(trial) == 0 for trial in logprobs):
        raise ValueError("cntp: every trial needs at least one token")
    means = [sum(trial) / len(trial) for trial in logprobs]
    return max(range(len(means)), key=lambda i: means[i])
