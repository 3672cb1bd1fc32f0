"""DiffAdapt: a prompt, temperature and length for easy, normal and hard questions, by a probe (arXiv 2510.19669).

Labels from a proxy run of a few samples per question, with accuracy a and mean token entropy h (nats):
  hard     a < low
  easy     a >= high and h >= the given quantile of h among questions with a >= high (solved, and still wandering)
  normal   all others
The probe predicts the class from the last hidden state of the prompt. Analysis: questions binned by accuracy, the mean
entropy of each bin, and the relative drop from the easiest bin to the lowest.

Q questions; classes EASY, NORMAL, HARD = 0, 1, 2. Deviations: the paper's thresholds are not known to us; they are
parameters. Fidelity: reconstructed (abstract and summaries).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.catalog import part

EASY, NORMAL, HARD = 0, 1, 2


@part("diffadapt", stage="probe", scope="batch", paper="arXiv:2510.19669")
def difficulty_labels(
    accuracy: Tensor, entropy: Tensor, *, low: float = 0.4, high: float = 0.8, quantile: float = 0.5
) -> Tensor:
    """Classes [Q], int64, of questions with `accuracy` [Q] in [0, 1] and `entropy` [Q] in nats.

    Raises:
        ValueError: unless 0 <= low <= high <= 1 and 0 <= quantile <= 1.
    """
    if not (0 <= low <= high <= 1 and 0 <= quantile <= 1):
        raise ValueError(
            f"diffadapt needs 0 <= low <= high <= 1 and a quantile in [0, 1], got {low}, {high}, {quantile}"
        )
    labels = torch.where(accuracy < low, HARD, NORMAL)
    solved = accuracy >= high
    if bool(solved.any()):
        bound = torch.quantile(entropy[solved].double(), quantile)
        labels = torch.where(solved & (entropy.double() >= bound), EASY, labels)
    return labels


@part("diffadapt/route", stage="probe", scope="row", paper="arXiv:2510.19669")
def route(probabilities: Tensor) -> Tensor:
    """The class [B] of each row of `probabilities` [B, 3]; equal ones go to normal, then hard."""
    order = torch.tensor([NORMAL, HARD, EASY], device=probabilities.device)
    return order[probabilities[:, order].argmax(-1)]


@part("diffadapt/entropy-by-accuracy", stage="analysis", scope="batch", paper="arXiv:2510.19669")
def entropy_by_accuracy(accuracy: Tensor, entropy: Tensor, *, bins: int = 5) -> tuple[Tensor, float]:
    """Mean entropy of each accuracy bin [bins], hardest first, NaN if empty; and the relative drop from the easiest.

    The drop is (easiest - lowest) / easiest over bins with questions.

    Raises:
        ValueError: without questions or bins.
    """
    if bins < 1 or accuracy.numel() == 0:
        raise ValueError("diffadapt bins questions by accuracy: give some questions and bins >= 1")
    # 0.6 * 5 is 3 by arithmetic and 3 - 4e-16 by rounding.
    at = (accuracy.double() * bins + 1e-9).floor().clamp(0, bins - 1).long()
    means = torch.stack([entropy[at == b].double().mean() for b in range(bins)])
    filled = means[~means.isnan()]
    easiest = float(filled[-1])
    return means, (easiest - float(filled.min())) / easiest if easiest > 0 else math.nan
