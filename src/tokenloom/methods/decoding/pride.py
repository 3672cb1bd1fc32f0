"""PriDe: take a model's prior for option letters out of its multiple-choice predictions (arXiv 2309.03882).

Model: P(d_i | q, x^I) is proportional to P_prior(d_i | q) * P(o_I(i) | q, x), letters d, contents o, permutation I.

Samples whose n cyclic orders were all queried (row m shows content (i + m) mod n under letter i; rows normalized):
  prior_i      softmax of the mean over rows of log P(d_i | x^I)
  prediction   for each content, the mean over rows of the probability of the letter it stood under
All others: one query, arg max_i log P(d_i) - log prior_i, with the mean of those priors.
RStd = standard deviation (over the number of options) of the recalls of the options, in percent.

1e-10 is added inside logs, as in the release. n options, m = n rows. Cost: 1 + alpha (n - 1) queries a sample when
a share alpha (the paper: 5 %) is permuted. Limit: an even prior changes nothing. Deviations: the release's softmax and
its normalization of rows add 1e-10 to denominators, which no row with mass feels. Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part

_SMALL = 1e-10


@part("pride", stage="shape", scope="row", paper="arXiv:2309.03882")
def debias(probs: Tensor, prior: Tensor) -> Tensor:
    """Scores [B, n] of the options as shown, from `probs` [B, n] (any scale per row) and `prior` [n]: their
    exponentials are the debiased probabilities up to a factor.
    """
    wide = torch.promote_types(probs.dtype, torch.float32)
    return (probs.to(wide) + _SMALL).log() - (prior.to(wide) + _SMALL).log()


@part("pride/prior", stage="probe", scope="row", paper="arXiv:2309.03882")
def prior_of(cyclic: Tensor) -> Tensor:
    """The prior [n] of one sample from its rows `cyclic` [n, n], one for each cyclic order, any scale per row.

    Raises:
        ValueError: unless it has as many rows as options and each row has mass.
    """
    return (_normalized(cyclic) + _SMALL).log().mean(0).softmax(0)


@part("pride/permuted", stage="rank", scope="row", paper="arXiv:2309.03882")
def permuted_mean(cyclic: Tensor) -> Tensor:
    """Probabilities [n] of the contents of one sample, the mean over its cyclic orders `cyclic` [n, n]; as above."""
    rows = _normalized(cyclic)
    n = len(rows)
    contents = torch.tensor(cyclic_orders(n), device=rows.device)
    return torch.zeros_like(rows).scatter_(1, contents, rows).mean(0)


@part("pride/rstd", stage="analysis", scope="batch", paper="arXiv:2309.03882")
def recall_std(predicted: Tensor, truth: Tensor, options: int) -> float:
    """RStd in percent of `predicted` [n] against `truth` [n], options numbered from 0.

    Options that are never the truth have no recall and are left out. A prediction below 0 (none) is wrong.

    Raises:
        ValueError: when no option is ever the truth.
    """
    recalls = [float((predicted[truth == i] == i).double().mean()) for i in range(options) if bool((truth == i).any())]
    if not recalls:
        raise ValueError(f"RStd needs samples whose truth is one of the {options} options")
    return 100 * float(torch.tensor(recalls, dtype=torch.float64).std(correction=0))


def cyclic_orders(n: int) -> list[list[int]]:
    """The n cyclic orders: entry i of order m is the content shown under letter i."""
    return [[(i + m) % n for i in range(n)] for m in range(n)]


def global_prior(priors: Sequence[Tensor]) -> Tensor:
    """The mean [n] of the priors of several samples.

    Raises:
        ValueError: when there is none.
    """
    if not priors:
        raise ValueError("pride needs the priors of some samples; permute a share of them, 5 % in the paper")
    return torch.stack(list(priors)).mean(0)


def _normalized(cyclic: Tensor) -> Tensor:
    if cyclic.ndim != 2 or cyclic.shape[0] != cyclic.shape[1]:
        raise ValueError(f"pride needs one row for each cyclic order, [n, n]; got {tuple(cyclic.shape)}")
    rows = cyclic.to(torch.promote_types(cyclic.dtype, torch.float32))
    totals = rows.sum(1, keepdim=True)
    if not bool((totals > 0).all()) or bool((rows < 0).any()):
        raise ValueError("pride needs probabilities >= 0 with some mass on the options in every row")
    return rows / totals
