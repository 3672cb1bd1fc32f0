"""Contrastive decoding: what an expert model says beyond an amateur one (arXiv 2210.15097, 2309.09117).

plausible_v = p_e(v) >= alpha max p_e; everything else becomes -inf                                       [B, V]
"original":  log p_e - log p_a, so that sampling follows the ratio of the two models;
"later":     (1 + beta) z_e - beta z_a, on raw scores. beta = 0 is the expert cut off as by min-p.
Limits: the same model twice makes all plausible tokens equal in the original form, and is min-p in the later one.
Deviations: where the amateur rules a token out, its log p_a counts as the lowest that it gives to any other, so that
no score is infinite. Fidelity: paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.decoding.min_p import min_p


@part("contrastive-decoding", stage="shape", scope="row", paper="arXiv:2210.15097")
def contrastive_decoding(
    scores: Tensor,
    amateur_scores: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
    form: Literal["original", "later"] = "original",
    amateur_temperature: float = 1.0,
) -> Tensor:
    """Scores [B, V] from the expert's and the amateur's; `beta` is for "later" only.

    Raises:
        ValueError: for alpha outside [0, 1], a negative beta, or an amateur temperature not above 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"contrastive-decoding: alpha is a share of the largest probability in [0, 1], got {alpha}")
    if beta < 0 or not amateur_temperature > 0:
        raise ValueError(
            f"contrastive-decoding: beta must be 0 or more and amateur_temperature above 0, got {beta} and "
            f"{amateur_temperature}"
        )
    plausible = min_p(scores.softmax(-1), min_p=alpha)
    amateur_scores = amateur_scores / amateur_temperature
    if form == "later":
        shaped = (1 + beta) * scores - beta * _finite(amateur_scores)
    else:
        shaped = scores.log_softmax(-1) - _finite(amateur_scores.log_softmax(-1))
    return shaped.masked_fill(~plausible, -torch.inf)


def _finite(scores: Tensor) -> Tensor:
    lowest = scores.masked_fill(scores == -torch.inf, torch.inf).amin(-1, keepdim=True)
    return torch.maximum(scores, lowest)
