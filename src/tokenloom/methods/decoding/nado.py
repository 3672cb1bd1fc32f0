"""NADO: split the odds that a text will satisfy an oracle into tokens, and decode by them (arXiv 2205.14219).

C(y) in {0, 1} judges whole texts; R(y_<=t) = P(C = 1 | y_<=t) under the model p.
q(v | y_<t) = p(v | y_<t) R(y_<t, v) / R(y_<t) is exactly p(y | C(y) = 1), token by token.
A head r gives R(y_<t, v) = sigmoid(r(y_<t)[v]) for all v at once; scores = log softmax(a_p log p + a log sigmoid(r))
loss = sum_t BCE(R(y_<=t), C) + lambda * sum_t KL(e_t || R(y_<=t)),   Bernoulli,
e_t = sum_v p(v | y_<=t) sigmoid(r(y_<=t)[v]): what R says one token later. Texts are drawn from p, or from another law
with weights p / law. Neither R nor e_t is detached; p has no gradient.

B rows, T response tokens, V vocabulary. log sigmoid(r) is bounded below by -30, so that an oracle that never says 1
leaves p as it is. Limit: C = 1 everywhere is p. Deviations: behind the last token nothing is expected, so it has no
consistency term (the release has one, on what follows the end); means over rows. The direction of the divergence is
that of the release's constrained generation; its translation has the other (`reverse`). Fidelity: code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tokenloom.catalog import part

_LEAST = -30.0


@part("nado", stage="shape", scope="row", paper="arXiv:2205.14219")
def nado(scores: Tensor, head: Tensor, *, alpha_p: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Log-probs [B, V] from the model's `scores` [B, V] and the `head`'s logits r [B, V]; -inf stays -inf."""
    shaped = alpha_p * scores.log_softmax(-1) + alpha * logsigmoid(head).clamp(min=_LEAST)
    return shaped.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(-1)


@part("nado/loss", stage="objective", scope="batch", paper="arXiv:2205.14219")
def nado_loss(
    head: Tensor,
    base: Tensor,
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    consistency: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """The loss of `head` [B, T, V] (r before each token) for texts `tokens` [B, T] with oracle `labels` [B].

    `base` [B, T, V] are the model's log-probs at the same places, `mask` [B, T] True on tokens, without holes,
    `weights` [B] the importance of each row (default 1). `consistency` is lambda.
    """
    # Filled before any logarithm: what stands off the mask shall reach neither the loss nor a gradient.
    off = ~mask[..., None]
    head, base = head.masked_fill(off, 0.0), base.detach().masked_fill(off, 0.0)
    taken = head.gather(-1, tokens[..., None])[..., 0]
    log_r, log_not_r = logsigmoid(taken), logsigmoid(-taken)
    truth = labels.to(head.dtype)[:, None]
    judged = torch.where(mask, -truth * log_r - (1 - truth) * log_not_r, 0.0).sum(1)

    log_e = (base + logsigmoid(head)).logsumexp(-1)[:, 1:]
    log_not_e = (base + logsigmoid(-head)).logsumexp(-1)[:, 1:]
    log_r, log_not_r = log_r[:, :-1], log_not_r[:, :-1]
    if reverse:
        divergence = _bernoulli_kl(log_r, log_not_r, log_e, log_not_e)
    else:
        divergence = _bernoulli_kl(log_e, log_not_e, log_r, log_not_r)
    apart = torch.where(mask[:, 1:], divergence, 0.0).sum(1)
    total = judged + consistency * apart
    return (total if weights is None else weights.to(total.dtype) * total).mean()


def _bernoulli_kl(log_p: Tensor, log_not_p: Tensor, log_q: Tensor, log_not_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
