"""KL estimators: values, gradients, guards, and the exact sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
    NAN,
    close,
    defaults,
    gradient,
    ones,
    row,
    vector,
)
from tokenloom.methods.policy_optimization.kl import estimate, full_ref_kl, kl, kl_full, kl_in_reward

ESTIMATORS: tuple[Any, ...] = ("k1", "k2", "k3", "k3+")


def slope(logprobs: float, ref: float, **settings: Any) -> Tensor:
    return gradient(lambda x: kl(x, row(ref), ones(1), **settings), row(logprobs))[0]


def test_defaults() -> None:
    expected = {"estimator": "k3", "value_limit": None, "exponent_limit": 20.0, "times_ratio": False}
    assert defaults("kl") == expected
    assert defaults("kl/in-reward") == {"coef": 0.05, "estimator": "k1", "per": "token"}


@pytest.mark.parametrize(
    ("estimator", "value", "gradient_"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", 0.1065307, 0.3934693), ("k3+", 0.1065307, 0.5)],
)
def test_worked_numbers(estimator: Any, value: float, gradient_: float) -> None:
    close(kl(row(-1.0), row(-1.5), ones(1), estimator=estimator), value, 1e-6)
    close(slope(-1.0, -1.5, estimator=estimator), gradient_, 1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_equal_laws_cost_nothing(estimator: Any) -> None:
    close(kl(row(-1.3), row(-1.3), ones(1), estimator=estimator), 0.0)
    close(slope(-1.3, -1.3, estimator=estimator), 0.0)


def test_k3_is_never_negative() -> None:
    x = torch.linspace(-30, 30, 601).double()[None]
    assert bool((kl(torch.zeros_like(x), x, ones(1, 601)) >= 0).all())


def test_expectations_over_a_small_vocabulary() -> None:
    # k1 and k3 are unbiased; on policy k3's gradient is the forward KL's and k2's the reverse KL's.
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g).double().requires_grad_()
    ref = torch.randn(5, generator=g).double().log_softmax(-1)
    probs = logits.log_softmax(-1).exp()
    reverse = (probs * (logits.log_softmax(-1) - ref)).sum()
    forward = (ref.exp() * (ref - logits.log_softmax(-1))).sum()
    for estimator in ("k1", "k3"):
        terms = estimate(logits.log_softmax(-1)[None], ref[None], ones(1, 5), estimator)[0]  # type: ignore[arg-type]
        close((probs.detach() * terms).sum(), reverse.detach())
    for estimator, whole in (("k3", forward), ("k2", reverse), ("k3+", reverse)):
        terms = estimate(logits.log_softmax(-1)[None], ref[None], ones(1, 5), estimator)[0]  # type: ignore[arg-type]
        (found,) = torch.autograd.grad((probs.detach() * terms).sum(), logits, retain_graph=True)
        (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
        close(found, expected)
    terms = estimate(logits.log_softmax(-1)[None], ref[None], ones(1, 5), "k1")[0]
    (nothing,) = torch.autograd.grad((probs.detach() * terms).sum(), logits)
    close(nothing, 0.0)


def test_far_from_the_reference_k3_neither_explodes_nor_turns() -> None:
    # Above the guard: constant, no gradient (a clamp of the exponential alone would push the log-prob down).
    close(kl(row(-60.0), row(-1.0), ones(1)), math.exp(20) - 21)
    close(slope(-60.0, -1.0), 0.0)
    # Below it: the exact value and its slope of almost 1.
    close(kl(row(-1.0), row(-61.0), ones(1)), 59.0)
    close(slope(-1.0, -61.0), 1.0)
    close(slope(-60.0, -1.0, estimator="k3+"), -59.0)
    assert bool(kl(torch.tensor([[-500.0]]), torch.tensor([[0.0]]), ones(1)).isfinite().all())


@pytest.mark.parametrize(
    ("x", "value", "gradient_"),
    [(1.0, math.e - 2, 1 - math.e), (3.0, 10.0, 0.0), (25.0, 10.0, 0.0), (-10.5, 9.5, 1.0), (-12.0, 10.0, 0.0)],
)
def test_verl_clamps_the_value_at_ten(x: float, value: float, gradient_: float) -> None:
    close(kl(row(-30.0), row(x - 30.0), ones(1), value_limit=10.0), value, 1e-4)
    close(slope(-30.0, x - 30.0, value_limit=10.0), gradient_, 1e-4)


def test_k1_is_clamped_from_both_sides() -> None:
    close(kl(row(-30.0), row(-1.0), ones(1), estimator="k1", value_limit=10.0), -10.0)


def test_trl_multiplies_by_the_ratio_and_keeps_its_gradient() -> None:
    log_ratio = row(math.log(2))
    close(kl(row(-1.0), row(-1.5), ones(1), log_ratio, times_ratio=True), 0.2130613, 1e-6)

    def corrected(logprobs: Tensor) -> Tensor:
        return kl(logprobs, row(-1.5), ones(1), logprobs + 1 + math.log(2), times_ratio=True)

    close(gradient(corrected, row(-1.0))[0], 1.0)  # d (r k3) = r (k3 + 1 - e^x) = -r x
    with pytest.raises(ValueError, match="log_ratio is not given"):
        kl(row(-1.0), row(-1.5), ones(1), times_ratio=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_and_reference_pass_nothing(estimator: Any) -> None:
    mask = torch.tensor([[True, False]])
    logprobs, ref = row(-1.0, NAN), row(-1.5, INF).requires_grad_()
    assert kl(logprobs, ref, mask, estimator=estimator)[0, 1].item() == 0
    assert not kl(logprobs, ref, mask, estimator=estimator).requires_grad
    assert gradient(lambda x: kl(x, ref.detach(), mask, estimator=estimator), logprobs)[0][0, 1].item() == 0


def test_in_the_reward_by_token_and_by_row() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old = torch.full((2, 3), -1.0).double()
    ref = torch.tensor([[-1.5, -0.75, NAN], [-3.0, 0.0, 0.0]]).double()
    rewards, by_token = vector(1.0, NAN), torch.tensor([[0.0, 1.0, 0.0], [NAN, 0.0, 0.0]]).double()
    found = kl_in_reward(rewards, by_token, old, ref, mask, coef=0.1)
    close(found[0], [-0.05, 1.025, 0.0])
    assert found[1].isnan().tolist() == [True, False, False]
    found = kl_in_reward(rewards, by_token, old, ref, mask, coef=0.1, per="row")
    close(found[0], 0.975)
    assert bool(found[1].isnan())
    found = kl_in_reward(rewards, by_token, old, ref, mask, coef=0.1, estimator="k2")
    close(found[0], [-0.0125, 1 - 0.003125, 0.0])


def test_full_kl_sums_over_the_vocabulary() -> None:
    probs, ref = vector(0.5, 0.25, 0.25), vector(0.25, 0.25, 0.5)
    found = full_ref_kl(probs.log()[None] + 3, ref.log()[None] - 1)
    close(found, 0.5 * math.log(2) - 0.25 * math.log(2))
    close(kl_full(row(0.3, NAN), torch.tensor([[True, False]])), [[0.3, 0.0]])


def test_full_kl_with_excluded_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, -INF]]).double().requires_grad_()
    found = full_ref_kl(logits, torch.tensor([[0.5, 0.0, -INF]]).double())
    close(found, full_ref_kl(logits[:, :2], torch.tensor([[0.5, 0.0]]).double()))
    (slopes,) = torch.autograd.grad(found.sum(), logits)
    assert bool(slopes.isfinite().all())
    assert slopes[0, 2].item() == 0
