"""TROLL: the sheet's worked projection, its gradient against finite differences, the sparse support, the limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    loss_of,
    make,
    ones,
    preset_defaults,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization import troll
from tokenloom.methods.policy_optimization.troll import (
    old_support,
    project,
    projected_log_ratio,
    return_to_projection,
    support_logprobs,
)

P, Q = vector(0.2, 0.2, 0.6), vector(0.5, 0.3, 0.2)
EPS = 0.05


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of two laws given by log-probs, [...]; 0 ln 0 = 0."""
    return torch.where(a.exp() > 0, a.exp() * (a - b), torch.zeros_like(a)).sum(-1)


def eta_of(logp: Tensor, logq: Tensor, eps: float) -> float:
    """The multiplier of one token, found with the equation alone."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        pi = ((middle * logq + logp) / (middle + 1)).log_softmax(-1)
        low, high = (middle, high) if float(kl(pi, logq)) > eps else (low, middle)
    return high


def neighbors(number: int, size: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs [number, size] of current and old laws."""
    g = torch.Generator().manual_seed(seed)
    old = 2 * torch.randn(number, size, generator=g, dtype=torch.float64)
    return (old + distance * torch.randn(number, size, generator=g, dtype=torch.float64)).log_softmax(
        -1
    ), old.log_softmax(-1)


def test_defaults() -> None:
    assert defaults("troll/project") == {"eps": 0.05}
    assert defaults("troll/return") == {"eps": 0.05}
    assert preset_defaults("troll") == {"eps": 0.05, "alpha": 1.0}
    assert (troll.SUPPORT, troll.TAIL, troll.FLOOR) == (64, 1e-5, 1e-12)


def test_what_it_needs() -> None:
    algorithm = make("troll")
    assert algorithm.loss_needs == {"logprobs", "support_logprobs"}
    # One update a batch: the old log-probs are those of the loss's own forward.
    assert algorithm.needs == {"old_support"}
    assert algorithm.given == {"old_support"}
    several = algorithm.override(updates={"mini_batches": 2})
    assert several.needs == {"old_support", "old_logprobs"}


def test_worked_projection() -> None:
    logp, logq = P.log(), Q.log()
    close(kl(logp, logq), 0.394816, 1e-6)
    pi, active = project(logp, logq, EPS)
    assert bool(active)
    close(pi.exp(), vector(0.3874, 0.2817, 0.3308), 1e-4)
    close(kl(pi, logq), EPS, 1e-9)
    close(kl(pi, logp), 0.155746, 1e-6)
    assert eta_of(logp, logq, EPS) == pytest.approx(1.656609, abs=1e-6)
    # The dual at its maximum is the primal: -(eta + 1) ln sum exp((eta ln q + ln p) / (eta + 1)) - eta eps.
    eta = eta_of(logp, logq, EPS)
    dual = -(eta + 1) * torch.logsumexp((eta * logq + logp) / (eta + 1), -1) - eta * EPS
    close(kl(pi, logp), dual)


def test_gradient_of_the_multiplier() -> None:
    logp, logq = P.log(), Q.log()
    eta = eta_of(logp, logq, EPS)
    step = 1e-6
    slopes = []
    for j in range(3):
        bump = torch.zeros(3, dtype=torch.float64)
        bump[j] = step
        slopes.append((eta_of(logp + bump, logq, EPS) - eta_of(logp - bump, logq, EPS)) / (2 * step))
    close(vector(*slopes), vector(-1.0981, -0.2953, 1.3933), 1e-4)
    found, slope = troll._multiplier(logp[None], logq[None], EPS)
    close(found, eta)
    # The multiplier is exact to 1e-15 of its size, so differences over 2e-6 to about 1e-9.
    close(slope[0], vector(*slopes), 1e-8)


def test_it_is_the_nearest_law_in_the_ball() -> None:
    logp, logq = P.log(), Q.log()
    best = kl(project(logp, logq, EPS)[0], logp)
    grid = torch.linspace(0.001, 0.998, 400, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    laws = torch.stack([a, b, 1 - a - b], -1)[a + b < 0.9995].log()
    inside = kl(laws, logq) <= EPS
    assert int(inside.sum()) > 1000
    assert float(kl(laws[inside], logp).min()) >= float(best) - 1e-12


@pytest.mark.parametrize("eps", [1e-6, 0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_never_beyond_the_ball(eps: float, dtype: torch.dtype) -> None:
    for distance in (0.01, 0.3, 3.0, 30.0):
        logp, logq = (x.to(dtype) for x in neighbors(200, 40, distance))
        pi, active = project(logp, logq, eps)
        # float32: 40 log-probs of size up to 100, each rounded to 6e-8 of its size, at weights that sum to 1.
        tolerance = 1e-9 if dtype == torch.float64 else 100 * 6e-8 * 4
        assert float(kl(pi.double(), logq.double()).max()) <= eps + tolerance
        close(pi.exp().sum(-1), 1.0, 1e-6 if dtype == torch.float32 else 1e-9)
        inside = kl(logp, logq) <= eps
        assert torch.equal(active, ~inside)
        close(pi[inside], logp[inside], 1e-5 if dtype == torch.float32 else 1e-9)
        if dtype == torch.float64:
            close(kl(pi[active], logq[active]), eps)


def test_equal_laws_are_left_alone_with_a_finite_gradient() -> None:
    logq = neighbors(5, 6, 0.0)[1]
    leaf = logq.clone().requires_grad_()
    pi, active = project(leaf, logq, EPS)
    assert not bool(active.any())
    (gradient,) = torch.autograd.grad(pi[:, 0].sum(), leaf)
    # Of ln p_0 - ln sum p, as for a log-softmax of the log-probs.
    close(gradient, torch.nn.functional.one_hot(torch.zeros(5, dtype=torch.long), 6) - logq.exp())
    nearly = (logq + 1e-9 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    tight, binds = project(nearly, logq, 1e-22)
    assert bool(tight.isfinite().all())
    assert bool(torch.autograd.grad(tight[:, 0].sum(), nearly)[0].isfinite().all())
    assert bool(binds.any())


def test_impossible_tokens_stay_so_without_nan() -> None:
    # The last token is impossible under both laws, or under the old one alone.
    logp = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.4, 0.2, 0.1, 0.3]], dtype=torch.float64).log().requires_grad_()
    logq = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.3, 0.3, 0.4, 0.0]], dtype=torch.float64).log()
    pi, active = project(logp, logq, EPS)
    assert active.tolist() == [True, True]
    (gradient,) = torch.autograd.grad(pi[:, 0].sum(), logp)
    assert bool(gradient.isfinite().all())
    close(pi.exp()[:, 3], 0.0)
    close(kl(pi, logq.clamp(min=-1e9)), EPS)
    close(pi[0, :3], project(logp[0, :3], logq[0, :3], EPS)[0])


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_a_ball_has_a_positive_radius(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        project(P.log(), Q.log(), eps)


# -- from logits to the objective


def objective(logits: Tensor, old_logits: Tensor, targets: Tensor, advantages: Tensor, eps: float) -> Tensor:
    """Sum of the policy's objective minus the return to the projection, through the chunk functions and parts."""
    held = old_support(old_logits, targets)
    slots = support_logprobs(logits, targets, held)[None]
    logprobs, old = (x.log_softmax(-1).gather(-1, targets[:, None]).T for x in (logits, old_logits))
    mask = ones(1, len(targets))
    ratio = projected_log_ratio(slots, logprobs, old, mask, eps=eps).exp()
    return (ratio * advantages).sum() - return_to_projection(slots, logprobs, old, mask, eps=eps).sum()


def numeric(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function."""
    out = torch.zeros_like(x)
    for at in range(x.numel()):
        bump = torch.zeros_like(x).reshape(-1)
        bump[at] = step
        bump = bump.reshape(x.shape)
        out.reshape(-1)[at] = (function(x + bump) - function(x - bump)) / (2 * step)
    return out


@pytest.mark.parametrize("policy_term", [True, False])
def test_gradient_of_the_objective_by_the_logits(policy_term: bool) -> None:
    g = torch.Generator().manual_seed(3)
    old = torch.randn(6, 7, generator=g, dtype=torch.float64)
    logits = old + torch.tensor([0.05, 0.1, 0.8, 1.0, 1.5, 3.0])[:, None] * torch.randn(6, 7, generator=g).double()
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    held = old_support(old, targets)
    beyond = kl(logits.log_softmax(-1), old.log_softmax(-1)) > EPS
    assert beyond.tolist() == [False, False, True, True, True, True]
    leaf = logits.clone().requires_grad_()
    if policy_term:
        advantages = torch.tensor([[1.0, -1.0, 0.7, -0.7, 2.0, -2.0]], dtype=torch.float64)

        def ratio_only(x: Tensor) -> Tensor:
            slots = support_logprobs(x, targets, held)[None]
            logprobs, before = (y.log_softmax(-1).gather(-1, targets[:, None]).T for y in (x, old))
            return (projected_log_ratio(slots, logprobs, before, ones(1, 6), eps=EPS).exp() * advantages).sum()

        (gradient,) = torch.autograd.grad(ratio_only(leaf), leaf)
        wanted = numeric(ratio_only, logits)
        assert bool((gradient.abs().amax(-1) > 1e-3).all()), "the gradient does not vanish beyond the ball, as a clip's"
    else:
        pi = project(logits.log_softmax(-1), old.log_softmax(-1), EPS)[0]

        def distance(x: Tensor) -> Tensor:
            # The projection is a constant in the loss.
            return kl(x.log_softmax(-1), pi)[beyond].sum()

        slots = support_logprobs(leaf, targets, held)[None]
        logprobs, before = (y.log_softmax(-1).gather(-1, targets[:, None]).T for y in (leaf, old))
        found = return_to_projection(slots, logprobs, before, ones(1, 6), eps=EPS)
        close(found[0], torch.where(beyond, kl(logits.log_softmax(-1), pi), torch.zeros(6).double()))
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        wanted = numeric(distance, logits)
    # Central differences of step 1e-5: third derivatives of size 10 leave 1e-9, rounding 1e-16 / 1e-5 = 1e-11.
    close(gradient, wanted, 1e-7)


def test_inside_the_ball_the_gradient_is_the_ratio_times_the_advantage() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("troll", eps=1e9, alpha=5.0)
    plain = algorithm.override(log_ratio="token-ratio", terms=None)
    found = algorithm.coefficients(rollouts, signals)
    close(found["logprobs"], coefficients_of(plain, rollouts, signals))
    assert bool((found["support_logprobs"] == 0).all())
    # The return costs nothing there.
    close(loss_of(algorithm, rollouts, signals), loss_of(plain, rollouts, signals))
    inside = make("troll").coefficients(rollouts, signals)
    assert not torch.allclose(inside["logprobs"], found["logprobs"])


def test_the_return_pulls_toward_the_projection() -> None:
    g = torch.Generator().manual_seed(1)
    old = torch.randn(1, 6, generator=g, dtype=torch.float64)
    logits, targets = old + 2 * torch.randn(1, 6, generator=g, dtype=torch.float64), torch.tensor([2])
    pi = project(logits.log_softmax(-1), old.log_softmax(-1), EPS)[0]
    far = kl(logits.log_softmax(-1), pi)
    for _ in range(60):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf, old, targets, torch.zeros(1, 1).double(), EPS), leaf)
        logits = logits + gradient
    assert float(kl(logits.log_softmax(-1), old.log_softmax(-1))) < EPS + 0.01
    assert float(kl(logits.log_softmax(-1), pi)) < float(far)


# -- the sparse support


def as_laws(slots: Tensor) -> tuple[Tensor, Tensor]:
    current, old = slots.chunk(2, -1)
    return current, old


def test_the_whole_vocabulary_when_it_is_small() -> None:
    logits, old = neighbors(4, 7, 0.5)
    targets = torch.tensor([6, 0, 3, 3])
    current, before = as_laws(support_logprobs(logits, targets, old_support(old, targets)))
    for laws, whole in ((current, logits), (before, old)):
        close(laws[:, 0], whole.gather(-1, targets[:, None])[:, 0])
        close(laws.exp().sum(-1), 1.0)
        close(laws.sort(-1).values[:, -7:], whole.sort(-1).values)
    assert torch.equal(current.isfinite(), before.isfinite())


def test_a_support_is_the_smallest_likely_set() -> None:
    mass = vector(0.7, 0.2, 0.0999, 0.000095, 0.000003, 0.000002)
    held = old_support(mass.log()[None], torch.tensor([5]))
    size = (held.shape[-1] - 1) // 2
    # 0.7 + 0.2 + 0.0999 + 0.000095 = 1 - 0.000005 is enough.
    assert held[0, :size][held[0, size:-1].isfinite()].tolist() == [0, 1, 2, 3]
    close(held[0, -1], mass[5].log())


def test_both_supports_are_joined_and_the_rest_is_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(troll, "SUPPORT", 2)
    old = vector(0.4, 0.3, 0.1, 0.1, 0.06, 0.04).log()[None]
    new = vector(0.1, 0.35, 0.05, 0.3, 0.15, 0.05).log()[None]
    targets = torch.tensor([4])
    held = old_support(old, targets)
    assert held[0, :2].tolist() == [0.0, 1.0]
    current, before = as_laws(support_logprobs(new, targets, held))
    # Slots: sampled 4; old 0, 1; new 1 (there already), 3; the rest 2, 5.
    close(current[0, :3].exp(), vector(0.15, 0.1, 0.35))
    close(before[0, :3].exp(), vector(0.06, 0.4, 0.3))
    assert current[0, 3] == before[0, 3] == -math.inf
    # What the old law has beside 0, 1 and 4 is 0.24, shared by 2, 3 and 5.
    close(current[0, 4:].exp(), vector(0.3, 0.1))
    close(before[0, 4:].exp(), vector(0.08, 0.16))


def test_the_sampled_token_is_there_once_and_always() -> None:
    logits = torch.zeros(2, 100, dtype=torch.float64)
    logits[:, :5] = 20.0
    targets = torch.tensor([2, 99])
    current, before = as_laws(support_logprobs(logits, targets, old_support(logits, targets)))
    assert torch.equal(current, before)
    # Five likely tokens, of which one is sampled, or five and an unlikely one; and the rest.
    assert current.isfinite().sum(-1).tolist() == [6, 7]
    close(current.exp().sum(-1), 1.0)
    close(current[1, 0], logits[1].log_softmax(-1)[99])


def test_a_token_new_among_the_likely_ones_of_a_flat_law_does_not_look_impossible_before() -> None:
    g = torch.Generator().manual_seed(0)
    old = 0.3 * torch.randn(1, 1000, generator=g, dtype=torch.float64)
    new = old + 0.05 * torch.randn(1, 1000, generator=g, dtype=torch.float64)
    targets = torch.tensor([0])
    current, before = as_laws(support_logprobs(new, targets, old_support(old, targets)))
    fresh = int(current.isfinite().sum()) - 66
    assert fresh > 0
    assert float(kl(new.log_softmax(-1), old.log_softmax(-1))) < 0.003
    # Ten tokens of 0.2 % each, e^20 times likelier than q_min, would be 0.4 nats.
    assert float(kl(current.log_softmax(-1), before.log_softmax(-1))) < EPS


def test_gradients_flow_through_the_support() -> None:
    logits, old = neighbors(3, 200, 1.0)
    leaf, targets = logits.clone().requires_grad_(), torch.tensor([5, 6, 7])
    value = objective(leaf, old, targets, torch.ones(1, 3).double(), EPS)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert bool(gradient.isfinite().all())
    # Adding a constant to the logits changes no law.
    close(gradient.sum(-1), 0.0)
    assert int((gradient != 0).sum()) > 100


def test_it_differs_from_a_clip_and_from_its_parts() -> None:
    rollouts, signals = synthetic_batch()
    found = coefficients_of(make("troll"), rollouts, signals)
    clipped = make("troll").override(surrogate="ppo-clip", log_ratio="token-ratio", terms=None)
    for other in (clipped, make("troll", alpha=0.0), make("troll").override(log_ratio="token-ratio")):
        assert not torch.allclose(found, coefficients_of(other, rollouts, signals), rtol=1e-6, atol=1e-9)
