"""SPLIT steering: preference and utility of an intervention, and an objective that serves both (zjunlp, EasyEdit).

A linear map h = W x + b is steered as h' = (W + m dW) x + (b + m db): a full dW, a low-rank dW = A B, or a vector db.
For a pair of continuations with losses L_p (wanted) and L_n (unwanted), L = -log P:
preference = L_n - L_p                                                            log odds of wanted against unwanted
utility = log(e^-L_p + e^-L_n) - log(1 - e^-L_p - e^-L_n)                         log odds of either against the rest
loss = lambda_p L_p + lambda_n L_n + gamma relu(theta - (L_n - L_p)) [+ rho (relu(L_p - R_p) + relu(L_n - R_n))]
R are the losses of the model without steering. "Why Steering Works"; repository zjunlp/EasyEdit.

Limits: m = 0 is the model itself; gamma = lambda_n = 0 is supervised tuning on the wanted continuation.
Deviations: the hinge acts on each pair, in the release on means of a batch (give means to have that). With losses that
are means over tokens, e^-L is a geometric mean per token and the two may sum to 1 or more: utility is +inf there.
Fidelity: code (objective), reconstructed (log odds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "Why Steering Works (zjunlp, 2026)"


@part("split-steering", stage="objective", scope="row", paper=PAPER)
def split_loss(
    loss_positive: Tensor, loss_negative: Tensor,
    reference_positive: Tensor | None = None, reference_negative: Tensor | None = None,
    *, weight_positive: float = 1.0, weight_negative: float = 0.5, weight_margin: float = 8.0, margin: float = 0.3,
    weight_reference: float = 0.0,
) -> Tensor:  # fmt: skip
    """The objective, a scalar: mean over pairs of losses of any one shape; references are not differentiated.

    Raises:
        ValueError: when references are weighted but missing.
    """
    hinge = torch.relu(margin - (loss_negative - loss_positive))
    loss = weight_positive * loss_positive + weight_negative * loss_negative + weight_margin * hinge
    if weight_reference:
        if reference_positive is None or reference_negative is None:
            raise ValueError("split-steering: weight_reference needs both reference losses, of the unsteered model")
        worse = torch.relu(loss_positive - reference_positive.detach())
        loss = loss + weight_reference * (worse + torch.relu(loss_negative - reference_negative.detach()))
    return loss.mean()


@part("split-steering/preference", stage="analysis", scope="row", paper=PAPER)
def preference_log_odds(loss_positive: Tensor, loss_negative: Tensor) -> Tensor:
    """Log odds of the wanted continuation against the unwanted one, in the shape of the losses."""
    return loss_negative - loss_positive


@part("split-steering/utility", stage="analysis", scope="row", paper=PAPER)
def utility_log_odds(loss_positive: Tensor, loss_negative: Tensor) -> Tensor:
    """Log odds that the model says either of the two, in the shape of the losses; +inf where they exhaust it."""
    either = torch.logaddexp(-loss_positive, -loss_negative)
    # 1 - e^x by expm1: of rare continuations 1 - e^x would round to 1.
    rest = torch.log(-torch.expm1(either.clamp(max=0.0)))
    return torch.where(either < 0, either - rest, torch.full_like(either, torch.inf))


@part("split-steering/linear", stage="shape", scope="row", paper=PAPER)
def steered_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None, *, multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """(W + m dW) x + (b + m db), [..., O], of x [..., I], weights [O, I] and biases [O]."""
    steered = weight if delta_weight is None else weight + multiplier * delta_weight
    shift = bias if delta_bias is None else multiplier * delta_bias + (0.0 if bias is None else bias)
    return torch.nn.functional.linear(x, steered, shift)
