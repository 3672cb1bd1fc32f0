"""Every preset on the shared batch: it differs from GRPO, obeys the reductions, and survives degenerate batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    loss_of,
    make,
    rollouts_of,
    signals_from,
    signals_of,
    synthetic_batch,
)
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.catalog import presets
from tokenloom.signals import Signals

SLUGS = sorted(s for s, p in presets().items() if p.family == "policy-optimization")
DIALECTS = [(s, d) for s in SLUGS for d in presets()[s].dialects]


@pytest.mark.parametrize("slug", [s for s in SLUGS if s != "grpo"])
def test_differs_from_grpo_somewhere(slug: str) -> None:
    rollouts, signals = synthetic_batch()
    found, grpo = (coefficients_of(a, rollouts, signals) for a in (make(slug), make("grpo", kl_coef=0.0)))
    assert not torch.allclose(found, grpo, rtol=1e-6, atol=1e-9)


# Each mechanism against the same composition without it, so that a different scale alone does not pass.
MECHANISMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a3po", {}, {"credit": None}),
    ("ar-lopti", {}, {"credit": None}),
    ("aspo", {}, {"surrogate": "ppo-clip"}),
    ("aspo", {}, {"bounds": {"high_entropy": 0.2}}),
    ("balanced-aggregation", {}, {"aggregate": "token-mean"}),
    ("balanced-aggregation", {}, {"aggregate": "sequence-mean"}),
    ("canon", {}, {"advantage": "dr-grpo/center"}),
    ("copo", {}, {"blend": None}),
    ("ctpo", {}, {"log_ratio": "token-ratio"}),
    ("ctpo", {}, {"bounds": {"power": 0.0}}),
    ("dhpo", {}, {"surrogate": "ppo-clip"}),
    ("dhpo", {"mixing": "entropy"}, {"surrogate": "dhpo"}),
    ("ha-dw", {}, {"credit": None}),
    ("hapo", {}, {"credit": None}),
    ("hapo", {}, {"bounds": {"alpha": 0.0}}),
    ("hapo", {}, {"advantage": "grpo", "credit": None, "bounds": "clip"}),
    ("holder-po", {}, {"log_ratio": "gspo"}),
    ("ktae", {}, {"credit": None}),
    ("cispo", {}, {"surrogate": "ppo-clip", "bounds": "clip"}),
    ("clip-cov", {"lb": 0.1}, {"weight": None}),
    ("dapo", {"dynamic_sampling": False, "overlong": "none"}, {"bounds": {"high": 0.2}}),
    ("dapo", {"dynamic_sampling": False}, {"reward": None}),
    ("dapo", {"overlong": "filter"}, {"select": None}),
    ("dr-grpo", {}, {"advantage": "grpo"}),
    ("dr-grpo", {}, {"aggregate": "sequence-mean"}),
    ("entropy-8020", {}, {"weight": None}),
    ("gspo", {"low": 0.1, "high": 0.1}, {"log_ratio": "token-ratio"}),
    ("gspo-token", {"low": 0.1, "high": 0.1}, {"log_ratio": "token-ratio"}),
    ("grpo", {}, {"terms": None}),
    ("kl-cov", {}, {"terms": None}),
    ("kl-cov", {}, {"surrogate": "ppo-clip"}),
    ("mis", {}, {"weight": None}),
    ("ppo-clip", {}, {"surrogate": "importance"}),
    ("ppo-gae", {}, {"advantage": {"lam": 0.5}}),
    ("reinforce", {}, {"advantage": "reinforce"}),
    ("reinforce-pp", {}, {"advantage": "reinforce-pp/baseline"}),
    ("rloo", {}, {"advantage": "dr-grpo/center"}),
    ("rloo", {"dialect": "trl"}, {"log_ratio": "token-ratio"}),
    ("sapo", {}, {"surrogate": "ppo-clip"}),
    ("attention-entropy", {}, {"weight": None}),
    ("delta-credit", {}, {"credit": None}),
    ("flow-tracer", {}, {"weight": None}),
    ("thr", {}, {"credit": None}),
    ("troll", {}, {"terms": None}),
    ("troll", {}, {"log_ratio": "token-ratio"}),
    ("tw-grpo", {}, {"weight": None}),
    ("tis", {}, {"weight": None}),
    ("vapo", {"value_pretraining": 0}, {"advantage": {"policy_lam": 1.0}}),
]


@pytest.mark.parametrize(
    ("slug", "settings", "without"), MECHANISMS, ids=[f"{s}-{'-'.join(w)}" for s, _, w in MECHANISMS]
)
def test_mechanism_shows_on_the_batch(slug: str, settings: dict[str, Any], without: dict[str, Any]) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make(slug, **settings)
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(**without)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("slug", "dialect"), DIALECTS)
def test_every_dialect_plans_and_prints(slug: str, dialect: str) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make(slug, dialect=dialect)
    assert bool(coefficients_of(algorithm, rollouts, signals, step=99).isfinite().all())
    assert algorithm.preset == slug


# -- reductions


def on_policy(signals: Signals) -> Signals:
    return signals.replace(old_logprobs=signals.logprobs)


def common(slug: str, **settings: Any) -> Algorithm:
    """A preset with GRPO's advantage and the sequence mean, nothing else changed."""
    return make(slug, **settings).override(advantage={"part": "grpo"}, aggregate="sequence-mean", terms=None)


@pytest.mark.parametrize(
    "slug",
    [
        "gspo",
        "gspo-token",
        "cispo",
        "sapo",
        "dual-clip",
        "clip-cov",
        "kl-cov",
        "tis",
        "ppo-clip",
        "reinforce",
        "aspo",
        "ctpo",
        "holder-po",
        "dhpo",
    ],
)
def test_on_policy_the_surrogates_have_the_same_gradient(slug: str) -> None:
    rollouts, signals = synthetic_batch()
    same = on_policy(signals)
    rollouts = rollouts.replace(sampler_logprobs=same.logprobs)
    algorithm = common(slug)
    if slug == "clip-cov":
        algorithm = algorithm.override(weight=None)
    close(coefficients_of(algorithm, rollouts, same), coefficients_of(common("grpo"), rollouts, same))


def test_one_token_makes_the_sequence_ratio_the_token_ratio() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.0, 1.0])
    signals = signals_of(rollouts, torch.tensor([[0.3], [-0.3], [0.1], [0.15]]))
    for slug in ("gspo", "gspo-token"):
        found = coefficients_of(common(slug, low=0.2, high=0.2), rollouts, signals)
        close(found, coefficients_of(common("grpo"), rollouts, signals))


def test_equal_lengths_make_the_means_agree() -> None:
    rollouts = rollouts_of([1.0, 0.0, 0.5], mask=[[1, 1, 1]] * 3)
    signals = signals_of(rollouts, torch.tensor([0.05, -0.3, 0.4]))
    found = [
        coefficients_of(make("grpo", kl_coef=0.0).override(aggregate=a), rollouts, signals)
        for a in ("sequence-mean", "token-mean", "dr-grpo/constant-length")
    ]
    close(found[1], found[0])
    close(found[2], found[0])


def test_a_constant_group_moves_nothing() -> None:
    rollouts = rollouts_of([0.1] * 5, mask=[[1, 1]] * 5)
    values = torch.full((5, 2), 0.1).double()
    signals = signals_of(rollouts, values=values, old_values=values, entropies=values)
    rollouts = rollouts.replace(sampler_logprobs=signals.logprobs)
    for slug in ("grpo", "rloo", "dr-grpo", "gspo", "sapo", "cispo", "tis", "mis", "dual-clip", "entropy-8020"):
        assert bool((coefficients_of(make(slug).override(terms=None), rollouts, signals) == 0).all()), slug


# -- degenerate batches


def all_masked() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    return rollouts.replace(mask=torch.zeros_like(rollouts.mask)), signals


def unscorable() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    return rollouts.replace(rewards=torch.full((12,), NAN).double()), signals


def one_row() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    return rollouts.rows([2]), signals.rows([2])


def one_token() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    return narrow(rollouts, signals, 1)


def no_token() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    return narrow(rollouts, signals, 0)


def narrow(rollouts: Rollouts, signals: Signals, width: int) -> tuple[Rollouts, Signals]:
    changes: dict[str, Any] = {n: getattr(rollouts, n)[:, :width] for n in ("tokens", "mask", "sampler_logprobs")}
    changes["extras"] = {n: v[:, :width] if v.ndim > 1 else v for n, v in rollouts.extras.items()}
    cut = signals_from({n: v[:, :width] for n, v in signals.named().items()})
    return rollouts.replace(lengths=rollouts.lengths.clamp(max=width), **changes), cut


def poisoned() -> tuple[Rollouts, Signals]:
    rollouts, signals = synthetic_batch()
    bad = {
        n: torch.where(rollouts.mask if v.ndim == 2 else rollouts.mask[..., None], v, torch.full_like(v, NAN))
        for n, v in signals.named().items()
    }
    assert rollouts.sampler_logprobs is not None
    sampler = torch.where(rollouts.mask, rollouts.sampler_logprobs, torch.full((), float("inf")).double())
    return rollouts.replace(sampler_logprobs=sampler), signals_from(bad)


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("make_batch", [all_masked, unscorable, one_row, one_token, no_token, poisoned])
def test_degenerate_batches_stay_finite(slug: str, make_batch: Any) -> None:
    rollouts, signals = make_batch()
    algorithm = make(slug)
    assert bool(loss_of(algorithm, rollouts, signals, step=99).isfinite())
    found: dict[str, Tensor] = algorithm.coefficients(rollouts, signals, step=99)
    for name, value in found.items():
        assert bool(value.isfinite().all()), name
        assert bool((value[~rollouts.mask] == 0).all()), name
    if make_batch is unscorable:
        assert bool((algorithm.override(terms=None).coefficients(rollouts, signals)["logprobs"] == 0).all())
    if make_batch is poisoned:
        clean = synthetic_batch()
        close(found["logprobs"], coefficients_of(algorithm, *clean, step=99))


@pytest.mark.parametrize("slug", SLUGS)
def test_float32_agrees_with_float64(slug: str) -> None:
    rollouts, signals = synthetic_batch()
    assert rollouts.rewards is not None
    assert rollouts.sampler_logprobs is not None
    single = rollouts.replace(
        rewards=rollouts.rewards.float(),
        sampler_logprobs=rollouts.sampler_logprobs.float(),
        extras={n: v.float() if v.is_floating_point() else v for n, v in rollouts.extras.items()},
    )
    low = signals_from({n: v.float() for n, v in signals.named().items()})
    # Eight tokens of a budget of 800 are worth 0.2 / 800 each, beside 0.8, whose neighbors in float32 are 6e-8 apart.
    settings = {"budget": 8.0} if slug == "rmt" else {}
    one, two = (coefficients_of(make(slug, **settings), r, s, step=99) for r, s in ((rollouts, signals), (single, low)))
    assert two.dtype == torch.float32
    torch.testing.assert_close(two.double(), one, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("slug", SLUGS)
def test_wider_padding_changes_nothing(slug: str) -> None:
    rollouts, signals = synthetic_batch()
    wide = Rollouts.concat(
        [
            rollouts,
            rollouts_of([0.0], [77], mask=[[0] * 11]).replace(
                truncated=torch.tensor([False]),
                sampler_logprobs=torch.zeros(1, 11).double(),
                sampling=Sampling(max_tokens=8),
                answers=(None,),
                prompts=({},),
                extras={
                    "reference_rewards": torch.zeros(1).double(),
                    "answer_mask": torch.zeros(1, 11, dtype=torch.bool),
                },
            ),
        ]
    ).rows(torch.arange(12))
    padded = signals_from(
        {n: torch.nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, 3)) for n, v in signals.named().items()}
    )
    one, two = (coefficients_of(make(slug), r, s, step=99) for r, s in ((rollouts, signals), (wide, padded)))
    close(two[:, :8], one)
