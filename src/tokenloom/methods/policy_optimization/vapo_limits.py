"""Diagnostics of what VAPO takes for granted (analysis; see B014): stage `metric`, no preset.

The discussion asks whether a critic can value long reasoning, what a length-adaptive lambda does, and whether
exploration survives. What can be measured on a batch, position being the fraction of the response's tokens before t:
critic       explained variance 1 - Var(returns - V) / Var(returns), over all tokens and by decile of position;
             bias, the mean of V - returns, by decile
lambda       mean, lowest and highest lam(l) = 1 - 1 / (alpha l) over rows
advantage    fraction of sampled tokens with |A| below a threshold
entropy      mean entropy in nats by decile
Deciles without tokens are left out; a variance of 0 has no explained share and is left out, too. Variances are
population variances. Fidelity: reconstructed (the source is a discussion without an algorithm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.methods.policy_optimization.vapo import adaptive_lambda

PAPER = "arXiv:2504.05118"
DECILES = 10


def position_deciles(mask: Tensor) -> Tensor:
    """Decile 0 to 9 of each sampled token's position in its row, [B, T] int64."""
    before = (mask.cumsum(-1) - 1).clamp(min=0)
    return DECILES * before // mask.sum(-1, keepdim=True).clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor | None:
    """1 - Var(returns - values) / Var(returns) of [N]; None when the returns do not vary.

    >>> float(explained_variance(torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0])))
    0.0
    """
    if len(returns) == 0 or bool((returns == returns[0]).all()):
        return None
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0)


@part("vapo-limits/critic", stage="metric", scope="batch", paper=PAPER)
def critic(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`explained`, and `explained/d`, `bias/d` for each decile d with tokens."""
    v, target, decile = values[mask], returns[mask], position_deciles(mask)[mask]
    found: dict[str, Tensor] = {}
    whole = explained_variance(v, target)
    found["explained"] = v.new_zeros(()) if whole is None else whole
    for d in torch.unique(decile).tolist():
        at = decile == d
        found[f"bias/{d}"] = (v[at] - target[at]).mean()
        own = explained_variance(v[at], target[at])
        if own is not None:
            found[f"explained/{d}"] = own
    return found


@part("vapo-limits/lambda", stage="metric", scope="batch", paper=PAPER)
def lambdas(mask: Tensor, *, alpha: float = 0.05) -> dict[str, Tensor]:
    """`mean`, `lowest` and `highest` lambda over the rows that have tokens; zeros without any."""
    lam = adaptive_lambda(mask, alpha)[:, 0][mask.any(-1)]
    if len(lam) == 0:
        lam = torch.zeros(1, device=mask.device)
    return {"mean": lam.mean(), "lowest": lam.min(), "highest": lam.max()}


@part("vapo-limits/advantage", stage="metric", scope="batch", paper=PAPER)
def small_advantages(advantages: Tensor, mask: Tensor, *, threshold: float = 0.01) -> dict[str, Tensor]:
    """`small`: the fraction of sampled tokens with |A| below the threshold."""
    small = (advantages[mask].abs() < threshold).to(advantages.dtype)
    return {"small": small.sum() / max(1, len(small))}


@part("vapo-limits/entropy", stage="metric", scope="batch", paper=PAPER)
def entropy_by_position(entropies: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`mean` and the mean of each decile with tokens, nats."""
    h, decile = entropies[mask], position_deciles(mask)[mask]
    found = {"mean": h.sum() / max(1, len(h))}
    return found | {str(d): h[decile == d].mean() for d in torch.unique(decile).tolist()}
