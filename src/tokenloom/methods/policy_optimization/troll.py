"""TROLL: project every token's distribution onto a KL ball around the old one, instead of clipping (arXiv 2510.03817).

Per token, with p the current and q the old distribution on a sparse support:
pi = p where KL(p || q) <= eps, else pi = (q^eta p)^(1 / (eta + 1)) / Z with eta > 0 such that KL(pi || q) = eps,
the solution of min KL(pi || p) subject to KL(pi || q) <= eps. KL(pi_eta || q) falls in eta, so there is one such eta.
objective = pi(y) / q(y) A, plus a loss alpha KL(p || sg pi) that pulls p back to its projection       [B, T]
Gradient through eta in closed form: d_j = ln pi_j - ln q_j, d eta / d ln p_j = pi_j (d_j - eps) / Var_pi(d).
Support: the most likely K tokens of each of the two, cut where their mass reaches 1 - delta, and the sampled token.
On it p is exact. q is known on its own support only; every further token shares what mass is left, at least q_min
each, and those in neither support together are one slot. Both are renormalized.
Inside the ball the log-ratio is the exact one, so that the gradient there is r A without the support's rounding.
eps and q_min are from memory. Limit: eps -> inf is unclipped importance sampling. Deviations: further tokens have
q_min in the source, which is the same where delta cuts the support; where K does, in flat distributions, a token that
enters the K most likely would then look e^20 times likelier than before. Fidelity: reconstructed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.signals import chunk_signal

PAPER = "arXiv:2510.03817"
SUPPORT, TAIL, FLOOR = 64, 1e-5, 1e-12
"""K; delta, the mass that may stay outside of the support; q_min."""
NEVER = -1e9
"""ln of an impossible token's probability: finite, because 0 * inf has no gradient."""
TINY = 1e-300


def _old_example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Four ids, their log-probs and the sampled token's."""
    ids = torch.rand(rows, width, 9, generator=generator, dtype=torch.float64).argsort(-1)[..., :4].double()
    logs = torch.randn(rows, width, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    return torch.cat([ids, logs], -1)


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Two neighboring distributions on five slots, one of them often unused; some inside the ball, some outside."""
    logits = torch.randn(2, rows, width, 5, generator=generator, dtype=torch.float64)
    logits[0, :, ::2, 1] = float("-inf")
    return torch.cat([(logits[0] + 0.5 * logits[1]).log_softmax(-1), logits[0].log_softmax(-1)], -1)


@chunk_signal("old_support", "logits", "targets", example=_old_example)
def old_support(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, 2 K + 1]: ids of the support, their log-probs (-inf where cut), the sampled token's log-prob."""
    law = torch.log_softmax(logits, -1)
    logs, ids = _support(law)
    return torch.cat([ids.to(law.dtype), logs, law.gather(-1, targets[:, None])], -1)


@chunk_signal("support_logprobs", "logits", "targets", "old_support", example=_example)
def support_logprobs(logits: Tensor, targets: Tensor, old_support: Tensor) -> Tensor:
    """[N, 2 S]: current, then old log-probs on the union of both supports, S = 2 K + 2 slots, not yet renormalized.

    Slot 0 is the sampled token, the last one everything in neither support; an unused slot holds -inf twice.
    """
    law = torch.log_softmax(logits, -1)
    size = (old_support.shape[-1] - 1) // 2
    old_ids, old_logs, old_sampled = old_support[:, :size].long(), old_support[:, size:-1], old_support[:, -1:]
    new_logs, new_ids = _support(law)
    sampled = targets[:, None]
    in_old = old_logs.isfinite() & (old_ids != sampled)
    known = torch.zeros_like(law, dtype=torch.bool).scatter(-1, old_ids, in_old).scatter(-1, sampled, True)
    fresh = new_logs.isfinite() & ~known.gather(-1, new_ids)
    slots = torch.cat([torch.ones_like(sampled, dtype=torch.bool), in_old, fresh], -1)
    current = _used(law.gather(-1, torch.cat([sampled, old_ids, new_ids], -1)), slots)
    held = _used(torch.cat([old_sampled, old_logs], -1), slots[:, : size + 1])
    further = law.shape[-1] - known.sum(-1, keepdim=True)
    floor = _floor(held, further)
    old = torch.cat([held, _used(floor.expand(fresh.shape), fresh)], -1)
    outside = law.shape[-1] - slots.sum(-1, keepdim=True)
    many = outside.to(law.dtype).log()
    return torch.cat([current, _floor(current.detach(), outside) + many, old, floor + many], -1)


def _support(law: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and ids [N, K] of the smallest likely set with mass 1 - delta; -inf behind it."""
    logs, ids = law.detach().topk(min(SUPPORT, law.shape[-1]))
    mass = logs.exp()
    return _used(logs, mass.cumsum(-1) - mass < 1 - TAIL), ids


def _used(logs: Tensor, slots: Tensor) -> Tensor:
    return torch.where(slots, logs, torch.full_like(logs, float("-inf")))


def _floor(logs: Tensor, count: Tensor) -> Tensor:
    """ln of what each of `count` [N, 1] tokens beside those of `logs` [N, S] has, [N, 1]."""
    left = 1 - logs.exp().sum(-1, keepdim=True)
    return (left / count.clamp(min=1)).clamp(min=FLOOR).log()


def project(logp: Tensor, logq: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ln pi [..., S], with gradient in `logp`, and where the constraint binds, bool [...]; both laws normalized.

    Raises:
        ValueError: when eps is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps is the KL that a token may move by, in nats, and must be positive; got {eps}")
    p, q = logp.clamp(min=NEVER), logq.detach().clamp(min=NEVER)
    with torch.no_grad():
        active = _kl(p, q) > eps
        eta, slope = torch.zeros_like(p[..., 0]), torch.zeros_like(p)
        if bool(active.any()):
            found = _multiplier(p[active].double(), q[active].double(), eps)
            eta[active], slope[active] = (x.to(p.dtype) for x in found)
    # eta with its gradient: the second summand is zero.
    return _mixed(p, q, eta + (slope * (p - p.detach())).sum(-1)), active


def _mixed(p: Tensor, q: Tensor, eta: Tensor) -> Tensor:
    return torch.log_softmax((eta[..., None] * q + p) / (eta[..., None] + 1), -1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def _multiplier(p: Tensor, q: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """eta [N] with KL(pi_eta || q) = eps, and d eta / d ln p [N, S].

    In s = 1 / (eta + 1), pi ~ q exp(s u) with u = ln p - ln q, dKL/ds = s Var_pi(u), and the root of KL is nearly
    linear: Newton's steps on it, halving where they leave the bounds.
    """
    u = p - q
    s, low, high = torch.ones_like(p[..., 0]), torch.zeros_like(p[..., 0]), torch.ones_like(p[..., 0])
    for _ in range(60):
        pi = torch.log_softmax(q + s[..., None] * u, -1)
        weight, d = pi.exp(), pi - q
        kl = (weight * d).sum(-1)
        found = (kl - eps).abs() <= 1e-13 + 1e-12 * eps
        if bool(found.all()):
            break
        high, low = torch.where(kl > eps, s, high), torch.where(kl > eps, low, s)
        root = kl.clamp(min=0).sqrt()
        step = s - 2 * root * (root - eps**0.5) / (s * _variance(weight, u).clamp(min=TINY))
        s = torch.where(found, s, torch.where((step > low) & (step < high), step, (low + high) / 2))
    off = d - kl[..., None]
    return 1 / s - 1, weight * off / _variance(weight, d).clamp(min=TINY)[..., None]


def _variance(weight: Tensor, x: Tensor) -> Tensor:
    off = x - (weight * x).sum(-1, keepdim=True)
    return (weight * off * off).sum(-1)


@part("troll/project", stage="log_ratio", scope="token", paper=PAPER)
def projected_log_ratio(
    support_logprobs: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, eps: float = 0.05
) -> Tensor:
    """ln pi(y) - ln q(y) [B, T], zero off the mask.

    Raises:
        ValueError: when eps is not positive.
    """
    p, q = _normalized(support_logprobs, logprobs, old_logprobs, mask)
    pi, active = project(p, q, eps)
    inside = where_mask(logprobs, mask) - where_mask(old_logprobs.detach(), mask)
    return where_mask(torch.where(active, pi[..., 0] - q[..., 0], inside), mask)


@part("troll/return", stage="term", scope="token", paper=PAPER)
def return_to_projection(
    support_logprobs: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, eps: float = 0.05
) -> Tensor:
    """KL(p || sg pi) [B, T] in nats, a loss, zero inside the ball and off the mask.

    Raises:
        ValueError: when eps is not positive.
    """
    p, q = _normalized(support_logprobs, logprobs, old_logprobs, mask)
    pi, active = project(p.detach(), q, eps)
    return where_mask(_kl(p, pi), active & mask)


def _normalized(support: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Current (with gradient) and old log-probs [B, T, S], the sampled token's from the signals that name it."""

    def law(slots: Tensor, sampled: Tensor) -> Tensor:
        joined = torch.cat([where_mask(sampled, mask)[..., None], slots[..., 1:]], -1)
        return torch.log_softmax(joined.clamp(min=NEVER), -1)

    current, old = where_mask(support, mask[..., None]).chunk(2, -1)
    return law(current, logprobs), law(old.detach(), old_logprobs.detach())


@preset("troll", paper=PAPER)
def troll_preset(*, eps: float = 0.05, alpha: float = 1.0) -> Algorithm:
    """GRPO's advantage and token mean with the projection in place of the clip."""
    return Algorithm.compose(
        advantage="grpo",
        surrogate="importance",
        log_ratio={"part": "troll/project", "eps": eps},
        aggregate="token-mean",
        terms=[{"part": "troll/return", "coef": alpha, "eps": eps}],
    )
