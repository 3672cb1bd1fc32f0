"""Losses and gradients against TRL's own `_compute_loss`, to 1e-6 in float32."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.signals import Signals

pytest.importorskip("trl")
harness: Any = importlib.import_module("parity.trl_harness")

TRL = {"dialect": "trl"}
SEQUENCE = {"part": "gspo", "limit": 20.0}
ALL_ROWS = {"part": "sequence-mean", "rows": "all"}


def own(slug: str, stages: dict[str, Any] | None = None, **settings: Any) -> Algorithm:
    return Algorithm.from_recipe({"preset": slug, **TRL, **settings}).override(**(stages or {}))


def advantages_of(algorithm: Algorithm, rollouts: Rollouts, signals: Signals) -> Tensor:
    found: Tensor = algorithm.plan(rollouts, signals).values["advantages"]
    return found


def check(tmp_path: Path, algorithm: Algorithm, seed: int = 0, **settings: Any) -> None:
    rollouts, signals = harness.batch(seed)
    theirs = harness.grpo_loss(
        harness.grpo_config(tmp_path, **settings), rollouts, signals, advantages_of(algorithm, rollouts, signals)
    )
    harness.agree(theirs, harness.own_loss(algorithm, rollouts, signals))


LOSSES: list[tuple[str, Algorithm, dict[str, Any]]] = [
    ("default", own("grpo"), {}),
    ("dapo", own("dapo", low=0.2, high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("grpo", own("grpo", {"aggregate": ALL_ROWS}), {"loss_type": "grpo"}),
    ("bnpo", own("grpo"), {"loss_type": "bnpo"}),
    ("dr_grpo", own("dr-grpo", length=11), {"loss_type": "dr_grpo", "max_completion_length": 11}),
    ("cispo", own("cispo"), {"loss_type": "cispo", "epsilon_high": 5.0}),
    ("cispo-tight", own("cispo", high=1.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    ("sapo", own("sapo"), {"loss_type": "sapo"}),
    (
        "sapo-hot",
        own("sapo", {"surrogate": {"tau_pos": 3.0, "tau_neg": 5.0}}),
        {"loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 5.0},
    ),
    (
        "gspo",
        own("gspo"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    (
        "gspo-wide",
        own("gspo", low=0.1, high=0.2),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.2},
    ),
    ("sequence-dapo", own("grpo", {"log_ratio": SEQUENCE}), {"importance_sampling_level": "sequence"}),
    (
        "luspo",
        own(
            "grpo",
            {"log_ratio": SEQUENCE, "aggregate": {"part": "dr-grpo/constant-length", "divisor": "one", "rows": "all"}},
        ),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    ("delta", own("dual-clip"), {"delta": 4.0}),
    ("delta-tight", own("dual-clip", cap=1.3), {"delta": 1.3}),
    ("kl", own("grpo", kl_coef=0.04), {"beta": 0.04}),
    (
        "kl-paper",
        own("grpo", {"terms": {"kl": {"times_ratio": False}}}, kl_coef=0.04),
        {"beta": 0.04, "use_bias_correction_kl": False},
    ),
    (
        "kl-sequence",
        own("grpo", {"log_ratio": SEQUENCE, "aggregate": ALL_ROWS}, kl_coef=0.3),
        {"beta": 0.3, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    ),
    ("kl-sapo", own("sapo").with_term("kl", coef=0.5, times_ratio=True), {"loss_type": "sapo", "beta": 0.5}),
    ("entropy-8020", own("entropy-8020"), {"top_entropy_quantile": 0.2}),
    (
        "entropy-kl",
        own("entropy-8020", rho=0.37).with_term("kl", coef=0.2, times_ratio=True),
        {"top_entropy_quantile": 0.37, "beta": 0.2},
    ),
    ("entropy-all", own("entropy-8020", rho=1.0), {"top_entropy_quantile": 1.0}),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("algorithm", "settings"), [x[1:] for x in LOSSES], ids=[x[0] for x in LOSSES])
def test_loss_and_gradient(tmp_path: Path, algorithm: Algorithm, settings: dict[str, Any], seed: int) -> None:
    check(tmp_path, algorithm, seed, **settings)


def test_the_batch_tells_the_losses_apart() -> None:
    rollouts, signals = harness.batch()
    found = {name: harness.own_loss(algorithm, rollouts, signals)[1] for name, algorithm, _ in LOSSES}
    same = {frozenset(p) for p in (("default", "bnpo"), ("default", "entropy-all"), ("bnpo", "entropy-all"))}
    for name, gradient in found.items():
        for other, second in found.items():
            if name < other and frozenset((name, other)) not in same:
                assert not torch.allclose(gradient, second, rtol=1e-4, atol=1e-6), f"{name} and {other}"


def test_on_policy_without_old_log_probs(tmp_path: Path) -> None:
    rollouts, signals = harness.batch()
    algorithm = own("grpo", kl_coef=0.1)
    advantages = advantages_of(algorithm, rollouts, signals)
    theirs = harness.grpo_loss(harness.grpo_config(tmp_path, beta=0.1), rollouts, signals, advantages, old=False)
    harness.agree(theirs, harness.own_loss(algorithm, rollouts, signals.replace(old_logprobs=None)))


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_engine_ratios_spare_the_kl(tmp_path: Path, mode: str) -> None:
    rollouts, signals = harness.batch()
    noise = 0.5 * torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(5))
    assert signals.old_logprobs is not None
    rollouts = rollouts.replace(sampler_logprobs=signals.old_logprobs - noise)
    algorithm = own("grpo", {"weight": [{"part": "tis", "level": mode, "maximum": 1.5}]}, kl_coef=0.1)
    weights = algorithm.plan(rollouts, signals).values["weights"]
    theirs = harness.grpo_loss(
        harness.grpo_config(tmp_path, beta=0.1),
        rollouts,
        signals,
        advantages_of(algorithm, rollouts, signals),
        importance_sampling_ratio=weights,
    )
    harness.agree(theirs, harness.own_loss(algorithm, rollouts, signals))


@pytest.mark.parametrize("high", [None, 0.4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo(tmp_path: Path, seed: int, high: float | None) -> None:
    from trl.trainer.rloo_config import RLOOConfig

    rollouts, signals = harness.batch(seed, empty=False)
    # RLOO knows no tool output: what stands within the length counts.
    inside = torch.arange(rollouts.mask.shape[1])[None] < rollouts.lengths[:, None]
    rollouts = rollouts.replace(mask=inside)
    algorithm = own("rloo", {"bounds": {"high": 0.2 if high is None else high}})
    args = RLOOConfig(output_dir=str(tmp_path), epsilon_high=high, **harness.QUIET)
    advantages = advantages_of(algorithm, rollouts, signals)[:, 0]
    theirs = harness.rloo_loss(args, rollouts, signals, advantages)
    harness.agree(theirs, harness.own_loss(algorithm, rollouts, signals))


def test_defaults_of_the_dialect_are_trls(tmp_path: Path) -> None:
    args = harness.grpo_config(tmp_path)
    assert (args.loss_type, args.epsilon, args.epsilon_high, args.delta) == ("dapo", 0.2, None, None)
    assert (args.beta, args.use_bias_correction_kl, args.scale_rewards) == (0.0, True, "group")
    assert (args.sapo_temperature_pos, args.sapo_temperature_neg) == (1.0, 1.05)
    assert args.vllm_importance_sampling_mode == "sequence_mask"
    assert (args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max) == (None, 3.0)
    (weight,) = own("mis").weight
    assert weight.params == {"level": "sequence", "minimum": None, "maximum": 3.0}
