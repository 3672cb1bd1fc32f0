"""UID decoding: search for probable text whose information is spread evenly (arXiv 2010.02650).

u_t = -log p(y_t | y_<t)      surprisal, nats
objective(y) = -sum_t u_t - lam R(y)

greedy          R = sum_t (u_t - min_v u_t(v))^2
variance        R = mean_t (u_t - mean u)^2
local-variance  R = mean_t (u_t - u_{t-1})^2, u_0 = 0: the first term is u_1^2
max             R = max_t u_t
square          R = sum_t u_t^2

Shapes: T tokens, V vocabulary. Limits: lam = 0 is the log-prob; lam -> inf with "greedy" is greedy search.
Deviations: the released statistics give a single token the variance u_1^2 / 2; here it is 0. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part

Regularizer = Literal["greedy", "variance", "local-variance", "max", "square"]
MONOTONE: frozenset[str] = frozenset({"greedy", "max", "square"})
"""Regularizers that never fall as a text grows."""


@part("uid-decoding", stage="search", scope="row", paper="arXiv:2010.02650")
def objective(surprisals: Tensor, least: Tensor, *, regularizer: Regularizer = "variance", lam: float = 1.0) -> Tensor:
    """The objective of a text of `surprisals` [T], T >= 1; `least` [T] are those of each step's likeliest token."""
    u = surprisals
    if regularizer == "greedy":
        r = (u - least).square().sum()
    elif regularizer == "variance":
        r = u.var(correction=0)
    elif regularizer == "local-variance":
        r = torch.diff(u, prepend=u.new_zeros(1)).square().mean()
    elif regularizer == "max":
        r = u.max()
    else:
        r = u.square().sum()
    return -u.sum() - lam * r


@part("uid-decoding/step", stage="search", scope="row", paper="arXiv:2010.02650")
def next_objectives(
    surprisals: Tensor,
    least: Tensor,
    following: Tensor,
    *,
    regularizer: Regularizer = "variance",
    lam: float = 1.0,
) -> Tensor:
    """The objectives [V] of a text with `surprisals` [T] and `least` [T], T >= 0, and one token more.

    `following` [V] are the surprisals of the next token, inf for what cannot follow.
    """
    past, u = surprisals.to(following.dtype), following
    steps = len(past) + 1
    if regularizer == "greedy":
        r = (past - least.to(u.dtype)).square().sum() + (u - u.min()).square()
    elif regularizer == "variance":
        # Around the mean so far, so that equal surprisals give exactly 0.
        mean = past.mean() if len(past) else u.new_zeros(())
        r = ((past - mean).square().sum() + (u - mean).square() * len(past) / steps) / steps
    elif regularizer == "local-variance":
        before = past[-1] if len(past) else u.new_zeros(())
        r = (torch.diff(past, prepend=u.new_zeros(1)).square().sum() + (u - before).square()) / steps
    elif regularizer == "max":
        r = u.clamp(min=float(past.max())) if len(past) else u
    else:
        r = past.square().sum() + u.square()
    return torch.where(u.isfinite(), -past.sum() - u - lam * r, -torch.inf)


@part("uid-decoding/metrics", stage="analysis", scope="row", paper="arXiv:2010.02650")
def metrics(surprisals: Tensor) -> dict[str, float]:
    """How evenly a text of `surprisals` [T] (nats, T >= 1) spreads its information.

    mean, variance, local_variance (with u_0 = 0), max, square (sum), and cv: the standard deviation over the mean.

    Raises:
        ValueError: for an empty text.
    """
    u = surprisals.detach().double()
    if u.numel() == 0:
        raise ValueError("uid-decoding: a text of no tokens has no surprisals to describe")
    mean, variance = float(u.mean()), float(u.var(correction=0))
    return {
        "mean": mean,
        "variance": variance,
        "local_variance": float(torch.diff(u, prepend=u.new_zeros(1)).square().mean()),
        "max": float(u.max()),
        "square": float(u.square().sum()),
        "cv": variance**0.5 / mean if mean else 0.0,
    }
