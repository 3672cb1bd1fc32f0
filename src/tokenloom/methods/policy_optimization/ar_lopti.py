"""AR and Lopti: keep low-probability tokens from dominating the update (arXiv 2505.12929).

With pi_t = exp(old_logprob_t), the probability of the sampled token:
AR      A'_t = (alpha pi_t + 1 - alpha) A_t                                             [B, T], both signs
Lopti   two successive complete rounds of updates on one batch: first the tokens with pi_t < eta, then the
        others at the weights that the first round left, with the same old log-probs
Why: for a softmax the gradient of the sampled token's log-prob by the logits is e_y - pi, whose norm lies in
(1 - pi_y) [sqrt(V / (V - 1)), sqrt 2], so unlikely tokens pull hardest. Tokens of the other round still count in
the policy term's normalizer; their KL is left out with them. A round without tokens is skipped, since a step with
zero gradient would still move by momentum. Limits: alpha = 0 is the base; eta = 0 or 1 is a single ordinary update.
Deviations: none. Fidelity: code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.methods.policy_optimization.mini_batches import mini_batches as deal

PAPER = "arXiv:2505.12929"


@part("ar-lopti/reweight", stage="credit", scope="token", paper=PAPER)
def reweight(advantages: Tensor, old_logprobs: Tensor, mask: Tensor, *, alpha: float = 0.3) -> Tensor:
    """Advantages [B, T] times alpha pi + 1 - alpha, which lies in [1 - alpha, 1].

    Raises:
        ValueError: for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is how far an impossible token's advantage is reduced, in [0, 1]; got {alpha}")
    weight = alpha * where_mask(old_logprobs, mask).exp() + (1 - alpha)
    return where_mask(weight * advantages, mask)


@part("ar-lopti/isolate", stage="updates", scope="batch", paper=PAPER)
def isolate(
    group_ids: Tensor, keep: Tensor, old_logprobs: Tensor, mask: Tensor, generator: torch.Generator,
    *, eta: float = 0.5, epochs: int = 1, mini_batches: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Rows [n] int64 and tokens [n, T] bool of each update: all those of the unlikely tokens, then all the others'.

    Raises:
        ValueError: for eta outside [0, 1], or fewer than one epoch or mini-batch.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is the probability that parts unlikely from likely tokens, in [0, 1]; got {eta}")
    # A token of probability 1 is below no eta but belongs with all others when eta leaves nothing out.
    unlikely = mask & ((where_mask(old_logprobs, mask).exp() < eta) | (eta == 1))
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    for share in (unlikely, mask & ~unlikely):
        if not bool((share & keep[:, None]).any()):
            continue
        for update in deal(group_ids, keep, generator, epochs=epochs, mini_batches=mini_batches):
            rows.append(update)
            tokens.append(share[update])
    return {"rows": rows, "tokens": tokens}


@preset("ar-lopti", paper=PAPER)
def ar_lopti_preset(
    *, use: Literal["both", "ar", "lopti"] = "both", alpha: float | None = None, eta: float | None = None
) -> Algorithm:
    """Both, or one of them, on GRPO with a higher upper limit, dual clip and a small KL.

    `None` takes the scripts' values: alpha 0.3 (0.2 for AR alone), eta 0.5 (0.4 for Lopti alone).
    """
    base = Algorithm.compose(
        advantage="grpo",
        surrogate="dual-clip",
        bounds={"part": "clip", "low": 0.2, "high": 0.24, "cap": 10.0},
        aggregate="token-mean",
        terms=[{"part": "kl", "coef": 1e-3, "estimator": "k3"}],
    )
    if use != "lopti":
        strength = alpha if alpha is not None else {"both": 0.3, "ar": 0.2}[use]
        base = base.override(credit=[{"part": "ar-lopti/reweight", "alpha": strength}])
    if use != "ar":
        limit = eta if eta is not None else {"both": 0.5, "lopti": 0.4}[use]
        base = base.override(updates={"part": "ar-lopti/isolate", "eta": limit})
    return base
