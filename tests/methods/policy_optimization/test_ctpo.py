"""CTPO: the likelihood ratio of the prefix, bounds that widen with the position."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    INF,
    NAN,
    close,
    coefficients_of,
    defaults,
    gradient,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.ctpo import ctpo, position_bounds
from tokenloom.methods.policy_optimization.dual_clip import dual_clip
from tokenloom.methods.policy_optimization.gspo import gspo
from tokenloom.methods.policy_optimization.importance import importance
from tokenloom.methods.policy_optimization.token_ratio import token_ratio

LOG_RATIOS = row(0.1, 0.1, -0.3)


def test_defaults() -> None:
    assert defaults("ctpo") == {"mode": "cumprod", "limit": 10.0}
    assert defaults("ctpo/bounds") == {"low": 0.025, "high": 0.05, "cap": 0.05, "power": 0.5}
    assert preset_defaults("ctpo") == {"mode": "cumprod", "mini_batches": 4, "sampler_cap": 5.0}
    algorithm = make("ctpo")
    assert (algorithm.terms, algorithm.surrogate.part.name) == ((), "dual-clip")
    assert algorithm.weight[0].params == {"level": "sequence", "maximum": 5.0}
    assert make("ctpo", sampler_cap=None).weight == ()
    assert make("ctpo", mode="geomean").bounds.params == {"power": -0.5}


def test_prefix_sums() -> None:
    close(ctpo(LOG_RATIOS, row(0, 0, 0), ones(1, 3)), [[0.1, 0.2, -0.1]])


def test_widths_grow_with_the_root_of_the_position() -> None:
    lo, hi, cap = position_bounds(LOG_RATIOS, ones(1, 3))
    close(hi.log(), [[0.05, 0.070711, 0.086603]], 1e-5)
    close(lo.log(), [[-0.025, -0.035355, -0.043301]], 1e-5)
    assert torch.equal(torch.as_tensor(cap), hi)


@pytest.mark.parametrize(
    ("advantage", "cap", "objective", "kept"),
    [
        (1.0, 0.05, [1.051271, 1.073271, 0.904837], [0, 0, 1]),
        (-1.0, None, [1.105171, 1.221403, 0.957623], [1, 1, 0]),
        (-1.0, 0.05, [1.051271, 1.073271, 0.957623], [0, 0, 0]),
    ],
)
def test_worked_objective(advantage: float, cap: float | None, objective: list[float], kept: list[int]) -> None:
    a, mask = row(*[advantage] * 3), ones(1, 3)

    def whole(x: Tensor) -> Tensor:
        log_ratio = ctpo(x, row(0, 0, 0), mask)
        return dual_clip(log_ratio, a, mask, *position_bounds(log_ratio, mask, cap=cap))

    close(whole(LOG_RATIOS), [[advantage * x for x in objective]], 1e-6)
    prefix = row(0.1, 0.2, -0.1).exp()
    close(gradient(whole, LOG_RATIOS)[0], advantage * prefix * torch.tensor([kept]))


def test_each_token_moves_itself_only() -> None:
    (jacobian,) = torch.autograd.functional.jacobian(lambda x: ctpo(x, row(0, 0, 0), ones(1, 3)), (LOG_RATIOS,))
    close(jacobian[0, :, 0], torch.eye(3).double())


def test_tool_tokens_are_skipped_by_the_sum_and_by_the_position() -> None:
    mask = torch.tensor([[True, False, False, True, True, False], [False] * 6])
    logprobs = torch.tensor([[0.1, 9.0, NAN, 0.1, -0.3, INF], [NAN] * 6], dtype=torch.float64)
    found = ctpo(logprobs, torch.zeros(2, 6).double(), mask)
    close(found, [[0.1, 0, 0, 0.2, -0.1, 0], [0] * 6])
    lo, hi, cap = position_bounds(found, mask)
    close(hi[mask].log(), [0.05, 0.05 * math.sqrt(2), 0.05 * math.sqrt(3)])
    for limit in (lo, hi, torch.as_tensor(cap)):
        assert bool(limit.isfinite().all())
    close(gradient(lambda x: ctpo(x, torch.zeros(2, 6).double(), mask), logprobs)[0], mask.double())


def test_one_token_is_the_token_ratio_with_log_bounds() -> None:
    logprobs, old = row(-0.7), row(-1.1)
    close(ctpo(logprobs, old, ones(1)), token_ratio(logprobs, old, ones(1)))
    lo, hi, _ = position_bounds(old, ones(1))
    close(torch.cat([lo, hi]).log(), [[-0.025], [0.05]])


def test_last_token_has_the_sequence_ratio() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    mask = rollouts.mask
    found = ctpo(signals.logprobs, signals.old_logprobs, mask)
    sequence = gspo(signals.logprobs, signals.old_logprobs, mask, normalize=False)
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    close(found[last], sequence[last])


def test_geometric_mean_of_the_prefix() -> None:
    found = ctpo(LOG_RATIOS, row(0, 0, 0), ones(1, 3), mode="geomean")
    close(found, [[0.1, 0.1, -0.1 / 3]])
    _, hi, _ = position_bounds(found, ones(1, 3), power=-0.5)
    close(hi.log(), [[0.05, 0.05 / math.sqrt(2), 0.05 / math.sqrt(3)]])
    rollouts, signals = synthetic_batch()
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    found = ctpo(signals.logprobs, signals.old_logprobs, rollouts.mask, mode="geomean")
    last = rollouts.mask & (rollouts.mask.flip(-1).cumsum(-1).flip(-1) == 1)
    close(found[last], gspo(signals.logprobs, signals.old_logprobs, rollouts.mask)[last])


def test_power_zero_is_a_uniform_clip() -> None:
    lo, hi, cap = position_bounds(LOG_RATIOS, ones(1, 3), power=0.0)
    for limit, width in ((lo, -0.025), (hi, 0.05), (torch.as_tensor(cap), 0.05)):
        close(limit, math.exp(width))


def test_clamps_of_terms_and_of_the_sum() -> None:
    found = ctpo(row(-50.0, 5.0, 40.0), row(0, 0, 0), ones(1, 3))
    close(found, [[-20.0, -15.0, 5.0]])
    found = ctpo(row(8.0, 8.0), row(0, 0), ones(1, 2))
    close(found, [[8.0, 10.0]])
    close(gradient(lambda x: ctpo(x, row(0, 0), ones(1, 2)), row(8.0, 8.0))[0], [[1.0, 0.0]])


def test_long_responses_stay_finite() -> None:
    logprobs = torch.full((1, 20_000), 0.7)
    log_ratio = ctpo(logprobs, torch.zeros_like(logprobs), ones(1, 20_000))
    assert float(log_ratio.max()) == 10.0
    for limit in position_bounds(log_ratio, ones(1, 20_000)):
        assert bool(torch.as_tensor(limit).isfinite().all())


@pytest.mark.parametrize("wrong", [{"low": -0.1}, {"high": -0.1}, {"cap": -0.1}])
def test_negative_widths_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="widths must be >= 0"):
        position_bounds(row(0.0), ones(1), **wrong)


# -- unbiasedness, by enumeration of a toy vocabulary

VOCABULARY, LENGTH = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def policy_of(seed: int) -> Tensor:
    """Logits of every prefix of less than LENGTH tokens: [prefixes, V]."""
    g = torch.Generator().manual_seed(seed)
    prefixes = sum(VOCABULARY**t for t in range(LENGTH))
    return torch.randn(prefixes, VOCABULARY, generator=g, dtype=torch.float64)


def prefix_ids() -> Tensor:
    """Which row of the policy's logits speaks before token t of each sequence: [S, LENGTH]."""
    ids, offset, code = [], 0, torch.zeros(len(SEQUENCES), dtype=torch.int64)
    for t in range(LENGTH):
        ids.append(offset + code)
        offset, code = offset + VOCABULARY**t, code * VOCABULARY + SEQUENCES[:, t]
    return torch.stack(ids, -1)


def logprobs_under(logits: Tensor) -> Tensor:
    """[S, LENGTH] of every sequence."""
    return logits.log_softmax(-1)[prefix_ids(), SEQUENCES]


def test_expectations_of_prefix_functions_are_those_of_the_new_policy() -> None:
    new, old = logprobs_under(policy_of(1)), logprobs_under(policy_of(2))
    ratio = ctpo(new, old, ones(*new.shape)).exp()
    g = torch.Generator().manual_seed(3)
    for t in range(LENGTH):
        # Any function of the prefix and token t: a table over prefixes of t + 1 tokens.
        table = torch.randn(VOCABULARY ** (t + 1), generator=g, dtype=torch.float64)
        code = sum(SEQUENCES[:, u] * VOCABULARY ** (t - u) for u in range(t + 1))
        values = table[code]
        wanted = (new.sum(-1).exp() * values).sum()
        close((old.sum(-1).exp() * ratio[:, t] * values).sum(), wanted, 1e-12)
        token_only = (old.sum(-1).exp() * (new - old).exp()[:, t] * values).sum()
        assert t == 0 or abs(float(token_only - wanted)) > 1e-3


def test_gradient_on_old_samples_is_the_exact_policy_gradient() -> None:
    logits, old = policy_of(1).requires_grad_(), logprobs_under(policy_of(2))
    rewards = torch.randn(len(SEQUENCES), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    new = logprobs_under(logits)
    exact = torch.autograd.grad((new.sum(-1).exp() * rewards).sum(), logits, retain_graph=True)[0]
    # Q of each prefix and token: the expected reward of what may follow under the new policy.
    chances = new.detach().sum(-1).exp()
    q = torch.zeros_like(old)
    for i, t in itertools.product(range(len(SEQUENCES)), range(LENGTH)):
        after = (SEQUENCES[:, : t + 1] == SEQUENCES[i, : t + 1]).all(-1)
        q[i, t] = (chances * rewards)[after].sum() / chances[after].sum()
    mask = ones(*old.shape)

    def estimate(log_ratio: Tensor) -> Tensor:
        expected = (old.sum(-1, keepdim=True).exp() * importance(log_ratio, q, mask)).sum()
        return torch.autograd.grad(expected, logits, retain_graph=True)[0]

    close(estimate(ctpo(new, old, mask)), exact, 1e-12)
    assert not torch.allclose(estimate(token_ratio(new, old, mask)), exact, rtol=1e-3, atol=1e-3)
    # Differentiating the product instead of taking it as a weight pushes earlier tokens once more.
    assert not torch.allclose(estimate(token_ratio(new, old, mask).cumsum(-1)), exact, rtol=1e-3, atol=1e-3)


# -- the composition


def test_on_policy_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    same = signals.replace(old_logprobs=signals.logprobs)
    plain = make("grpo", kl_coef=0.0).override(aggregate="token-mean")
    for mode in ("cumprod", "geomean"):
        found = coefficients_of(make("ctpo", mode=mode, sampler_cap=None), rollouts, same)
        close(found, coefficients_of(plain, rollouts, same))


def test_coefficients_of_a_batch() -> None:
    rollouts = rollouts_of([1.0, 0.0], mask=[[1, 1, 1], [1, 1, 1]])
    signals = signals_of(rollouts, torch.cat([LOG_RATIOS, row(-0.01, 0.05, -0.2)]))
    found = coefficients_of(make("ctpo", sampler_cap=None), rollouts, signals)
    share = 0.5 / (math.sqrt(0.5) + 1e-6) / 6
    # log R: row 0 [.1, .2, -.1], of which two are beyond the clip; row 1 [-.01, .04, -.16], of which the last is.
    expected = torch.cat([row(0, 0, math.exp(-0.1)), row(-math.exp(-0.01), -math.exp(0.04), 0)])
    close(found, share * expected)


def test_sampler_weight_multiplies() -> None:
    rollouts, signals = synthetic_batch()
    found, plain = (coefficients_of(make("ctpo", sampler_cap=c), rollouts, signals) for c in (5.0, None))
    weights = make("ctpo").plan(rollouts, signals).values["weights"]
    close(found, plain * weights)


def test_mechanisms_show_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("ctpo")
    found = coefficients_of(algorithm, rollouts, signals)
    for without in ({"log_ratio": "token-ratio"}, {"bounds": {"power": 0.0}}, {"bounds": {"cap": None}}):
        assert not torch.allclose(found, coefficients_of(algorithm.override(**without), rollouts, signals))
