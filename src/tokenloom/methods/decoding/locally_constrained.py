"""Locally constrained decoding: mask what the constraint forbids, renormalize, go on.

p'(v) = p(v) 1{v allowed} / Z,   Z = Σ_{v allowed} p(v)                     [V]; Z is the mass that was kept

Strings so drawn do not follow the model's law given the constraint: the product of the Z of a string's steps is its
missing weight. With the weights (`locally-constrained/token`) it is a proposal for sequential Monte Carlo.
Deviation: a step that allows nothing is an error here, never a token that the constraint forbids. Fidelity: baseline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw

_PAPER = "baseline (biased; corrected in arXiv:2504.05410)"


@part("locally-constrained", stage="shape", scope="row", paper=_PAPER)
def locally_constrained(scores: Tensor, allowed: Tensor) -> Tensor:
    """`scores` [B, V] with -inf wherever `allowed` [B, V] is False.

    Raises:
        ValueError: when a row is left without a token of finite score.
    """
    masked = scores.masked_fill(~allowed, -torch.inf)
    if not bool((masked > -torch.inf).any(-1).all()):
        raise ValueError("the constraint allows no token that the model gives mass to")
    return masked


@part("locally-constrained/token", stage="choose", scope="row", paper=_PAPER)
def masked_token(logw: Tensor, allowed: Tensor, draw: Draw) -> tuple[int, float]:
    """A token from `logw` [V] (unnormalized) among `allowed` [V], and the log of the mass allowed.

    The weight makes it proper: E[e^w 1{x = v}] is v's mass if allowed, else 0. Where nothing is allowed: token -1 and
    weight -inf.
    """
    masses = logw.detach().double().cpu()
    top = float(masses.max())
    masses = (masses - top).exp() * allowed.cpu()
    kept = float(masses.sum())
    if kept <= 0:
        return -1, -math.inf
    return draw.categorical(masses), top + math.log(kept)
