"""Dynamic context cutoff: stop reading a context when probes on attention heads find it sufficient (arXiv 2502.01025).

Training: prefixes of contexts in steps of 10 %, labeled sufficient iff the gold span lies inside. One logistic probe
per head on its output at the last token; the heads of the best validation F1 are kept and their outputs joined;
outliers clipped to [Q1 - 1.5 IQR, Q3 + 1.5 IQR]; an ensemble votes, its best member with the largest weight.
Inference: the context comes in chunks of equal size (the remainder spread over the first); reading stops at the first
chunk with P(sufficient) >= threshold, else after the last.

Defaults: 10 chunks, 5 heads, 4 members, a threshold tuned for precision 0.9. n samples, D features, M members.
Deviations: the release clips a single sample by its own quartiles, which does nothing; bounds are those of training
here, and serve the choice of heads too. Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("context-cutoff", stage="search", scope="row", paper="arXiv:2502.01025")
def chunk_ends(length: int, *, chunks: int = 10) -> list[int]:
    """Where chunks of a context of `length` tokens end, ascending; a context shorter than `chunks` has fewer.

    Raises:
        ValueError: for chunks < 1 or an empty context.
    """
    if chunks < 1 or length < 1:
        raise ValueError(f"context-cutoff needs chunks >= 1 and a context, got {chunks} chunks of {length} tokens")
    size, rest = divmod(length, chunks)
    return [i * size + min(i, rest) for i in range(1, min(chunks, length) + 1)]


@part("context-cutoff/labels", stage="probe", scope="row", paper="arXiv:2502.01025")
def sufficient(ends: Tensor, gold_end: int | Tensor) -> Tensor:
    """Whether prefixes that end at `ends` [n] (exclusive) hold a gold span that ends at `gold_end` (exclusive), [n]."""
    return ends >= gold_end


@part("context-cutoff/f1", stage="analysis", scope="batch", paper="arXiv:2502.01025")
def f1_score(predicted: Tensor, labels: Tensor) -> float:
    """F1 of `predicted` [n] bool for the positives of `labels` [n] bool; 0 without true positives."""
    hits = int((predicted & labels).sum())
    return 2 * hits / max(int(predicted.sum()) + int(labels.sum()), 1)


@part("context-cutoff/outliers", stage="probe", scope="batch", paper="arXiv:2502.01025")
def outlier_bounds(features: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and upper bounds [D] of `features` [n, D], 1.5 interquartile ranges beyond the quartiles."""
    at = torch.tensor([0.25, 0.75], dtype=features.dtype, device=features.device)
    q1, q3 = torch.quantile(features, at, dim=0)
    return q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)


@part("context-cutoff/vote", stage="probe", scope="row", paper="arXiv:2502.01025")
def soft_vote(probabilities: Tensor) -> Tensor:
    """P(sufficient) [n] from the members' [M, n], best member first: weights fall by 0.1 down to 1."""
    m = len(probabilities)
    weights = 1.0 + torch.arange(m - 1, -1, -1, dtype=probabilities.dtype, device=probabilities.device) / 10
    return (weights[:, None] * probabilities).sum(0) / weights.sum()


@part("context-cutoff/threshold", stage="probe", scope="batch", paper="arXiv:2502.01025")
def threshold_for(probabilities: Tensor, labels: Tensor, *, precision: float = 0.9) -> float:
    """The lowest threshold at which predictions `probabilities` [n] >= it reach `precision` on `labels` [n] bool.

    If none does, that of the best precision; of several, the lowest.

    Raises:
        ValueError: when no label is positive.
    """
    if not bool(labels.any()):
        raise ValueError("context-cutoff tunes its threshold on samples of which some are sufficient; none is")
    ordered, at = probabilities.sort(descending=True)
    reached = labels[at].double().cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    # Equal probabilities stand or fall together: only the last of each run is a threshold.
    whole = torch.cat((ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)))
    found, thresholds = reached[whole], ordered[whole]
    good = found >= min(precision, float(found.max())) - 1e-12
    return float(thresholds[good][-1])
