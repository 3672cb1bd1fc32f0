"""Laws of surrogates: their closed form is their derivative, and on policy that is the advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import Part
from tokenloom.composition import Bound
from tokenloom.context import Context
from tokenloom.laws import law
from tokenloom.signals import signal_example, signal_names
from tokenloom.testing.batches import evaluate, random_batch, vocabulary_values
from tokenloom.testing.variations import same


@law(lambda p: p.stage == "surrogate")
def _closed_form_equals_autograd(part: Part) -> None:
    assert part.multiplier is not None, f"{part.name}: a surrogate states its multiplier in closed form"
    ctx, leaf, advantages = _grid()
    bound = Bound(part)
    (gradient,) = torch.autograd.grad(ctx.call(bound).sum(), leaf)
    closed = ctx.multiplier(bound)
    assert closed is not None
    same(gradient, closed * advantages, f"{part.name}: closed form and autograd differ")


@law(lambda p: p.stage == "surrogate")
def _on_policy_gradient_is_the_advantage(part: Part) -> None:
    rollouts, signals = random_batch(15)
    assert signals.logprobs is not None
    leaf = signals.logprobs.clone().requires_grad_()
    values = vocabulary_values(rollouts, signals)
    advantages = values["advantages"]
    log_ratio = leaf - signals.logprobs
    values |= {"logprobs": leaf, "log_ratio": log_ratio, "ratio": log_ratio.exp()}
    (gradient,) = torch.autograd.grad(evaluate(part, values).sum(), leaf)
    expected = torch.where(rollouts.mask, advantages, torch.zeros_like(advantages))
    same(gradient, expected, f"{part.name}: at ratio 1 the gradient must be A")


def _grid() -> tuple[Context, Tensor, Tensor]:
    """Ratios just inside and outside every limit, and far away, for positive, negative and zero advantages."""
    lo, hi, cap = 0.8, 1.28, 3.0
    edges = [e * s for e in (lo, 1.0, hi, cap) for s in (1 - 1e-4, 1 + 1e-4)] + [0.01, 0.5, 2.0, 8.0, 50.0]
    ratio = torch.tensor(edges, dtype=torch.float64).repeat(3, 1)
    advantages = torch.tensor([[1.7], [-0.6], [0.0]], dtype=torch.float64).expand(ratio.shape)
    old = torch.full_like(ratio, -1.3)
    leaf = (old + ratio.log()).requires_grad_()
    mask = torch.ones_like(ratio, dtype=torch.bool)
    values = {"logprobs": leaf, "old_logprobs": old, "log_ratio": leaf - old, "advantages": advantages}
    values |= {n: torch.full_like(old, 0.4) for n in ("entropies", "values", "old_values", "ref_logprobs", "weights")}
    g = torch.Generator().manual_seed(0)
    values |= {n: signal_example(n, old.shape[0], old.shape[1], g) for n in signal_names()}
    return Context(values | {"lo": lo, "hi": hi, "cap": cap}, mask), leaf, advantages
