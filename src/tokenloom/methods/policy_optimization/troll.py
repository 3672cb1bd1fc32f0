"""TROLL: project every token's distribution onto a KL ball around the old one, instead of clipping (arXiv 2510.03817).

Per token, with p the current and q the old distribution on a sparse support:
pi = p where KL(p || q) <= eps, else pi = (q^eta p)^(1 / (eta + 1)) / Z with eta > 0 such that KL(pi || q) = eps,
the solution of min KL(pi || p) subject to KL(pi || q) <= eps. KL(pi_eta || q) falls in eta, so eta is bisected.
objective = pi(y) / q(y) A, plus a loss alpha KL(p || sg pi) that pulls p back to its projection       [B, T]
Gradient through eta in closed form: d_j = ln pi_j - ln q_j, d eta / d ln p_j = pi_j (d_j - eps) / Var_pi(d).
Sparse support: of each distribution the most likely K tokens, cut where their mass reaches 1 - delta; always the
sampled token; every other token has mass q_min, those in neither support together in one last slot; renormalized.
Inside the ball the log-ratio is the exact one, so that the gradient there is r A without the support's rounding.
eps and q_min are from memory. Limit: eps -> inf is unclipped importance sampling. Fidelity: reconstructed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import where_mask
from tokenloom.signals import chunk_signal

PAPER = "arXiv:2510.03817"
SUPPORT, TAIL, FLOOR = 64, 1e-5, math.log(1e-12)
"""K; delta, the mass that may stay outside of the support; ln q_min."""


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Two neighboring distributions on five tokens, as `support_logprobs` lays them out."""
    logits = torch.randn(2, rows, width, 5, generator=generator, dtype=torch.float64)
    return torch.log_softmax(torch.stack([logits[0] + 0.7 * logits[1], logits[0]]), -1).movedim(0, -2).flatten(-2)


def _old_example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    ids = torch.rand(rows, width, 9, generator=generator, dtype=torch.float64).argsort(-1)[..., :4].double()
    logs = torch.randn(rows, width, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    return torch.cat([ids, logs], -1)


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
    old_ids, old_logs = old_support[:, :size].long(), old_support[:, size:-1]
    new_logs, new_ids = _support(law.detach())
    sampled = targets[:, None]
    in_old = old_logs.isfinite() & (old_ids != sampled)
    in_new = new_logs.isfinite() & (new_ids != sampled)
    same = old_ids[:, :, None] == new_ids[:, None, :]
    both = same & in_old[:, :, None] & in_new[:, None, :]
    fresh = in_new & ~both.any(1)
    never, floor = torch.full_like(old_logs, -math.inf), torch.full_like(old_logs, FLOOR)
    current = torch.cat(
        [
            law.gather(-1, sampled),
            torch.where(in_old, torch.where(both.any(2), law.gather(-1, old_ids), floor), never),
            torch.where(fresh, law.gather(-1, new_ids), never),
        ],
        -1,
    )
    old = torch.cat([old_support[:, -1:], torch.where(in_old, old_logs, never), torch.where(fresh, floor, never)], -1)
    outside = law.shape[-1] - current.isfinite().sum(-1, keepdim=True)
    rest = FLOOR + outside.to(law.dtype).log()
    return torch.cat([current, rest, old, rest], -1)


def _support(law: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and ids [N, K] of the smallest likely set with mass 1 - delta; -inf behind it."""
    logs, ids = law.detach().topk(min(SUPPORT, law.shape[-1]))
    mass = logs.exp()
    return torch.where(mass.cumsum(-1) - mass < 1 - TAIL, logs, torch.full_like(logs, -math.inf)), ids


def project(logp: Tensor, logq: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ln pi [..., S], with gradient in `logp`, and where the constraint binds, bool [...]. Both normalized; -inf = 0.

    Raises:
        ValueError: when eps is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps is the KL that a token may move by, in nats, and must be positive; got {eps}")
    there = logp.isfinite() & logq.isfinite()
    p = torch.where(there, logp, torch.full_like(logp, -1e9))
    q = torch.where(there, logq, torch.full_like(logq, -1e9))
    with torch.no_grad():
        active = _kl(p, q) > eps
        eta = torch.where(active, _multiplier(p.double(), q.double(), eps).to(p.dtype), torch.zeros_like(p[..., 0]))
        fixed = _mixed(p, q, eta)
        d = fixed - q
        weight = fixed.exp()
        variance = (weight * d * d).sum(-1) - (weight * d).sum(-1) ** 2
        slope = weight * (d - eps) / variance.clamp(min=torch.finfo(p.dtype).tiny)[..., None]
        slope = torch.where(active[..., None], slope, torch.zeros_like(slope))
    return _mixed(p, q, eta + (slope * (p - p.detach())).sum(-1)), active


def _mixed(p: Tensor, q: Tensor, eta: Tensor) -> Tensor:
    return torch.log_softmax((eta[..., None] * q + p) / (eta[..., None] + 1), -1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def _multiplier(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """eta [...] with KL(pi_eta || q) = eps, by bisection in ln(1 + eta)."""
    low, high = torch.zeros_like(p[..., 0]), torch.full_like(p[..., 0], math.log(1e9))
    for _ in range(60):
        middle = (low + high) / 2
        outside = _kl(_mixed(p, q, middle.expm1()), q) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return high.expm1()


def _normalized(support: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Current (with gradient) and old log-probs [B, T, S], the sampled token's from the signals that name it."""
    current, old = where_mask(support, mask[..., None]).chunk(2, -1)
    current = torch.cat([where_mask(logprobs, mask)[..., None], current[..., 1:]], -1)
    old = torch.cat([where_mask(old_logprobs.detach(), mask)[..., None], old.detach()[..., 1:]], -1)
    return torch.log_softmax(current, -1), torch.log_softmax(old, -1)


@part("troll/project", stage="log_ratio", scope="token", paper=PAPER)
def projected_log_ratio(
    support_logprobs: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, eps: float = 0.05
) -> Tensor:
    """ln pi(y) - ln q(y) [B, T], zero off the mask."""
    p, q = _normalized(support_logprobs, logprobs, old_logprobs, mask)
    pi, active = project(p, q, eps)
    inside = where_mask(logprobs, mask) - where_mask(old_logprobs.detach(), mask)
    return where_mask(torch.where(active, pi[..., 0] - q[..., 0], inside), mask)


@part("troll/return", stage="term", scope="token", paper=PAPER)
def return_to_projection(
    support_logprobs: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, eps: float = 0.05
) -> Tensor:
    """KL(p || sg pi) [B, T], a loss, zero inside the ball."""
    p, q = _normalized(support_logprobs, logprobs, old_logprobs, mask)
    pi, active = project(p.detach(), q, eps)
    there = p.detach() > -1e8
    kl = torch.where(there, p.exp() * (p - pi), torch.zeros_like(p)).sum(-1)
    return torch.where(active & mask, kl, torch.zeros_like(kl))


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
