"""AR and Lopti: unlikely tokens weigh less, or go first and alone."""

from __future__ import annotations

import math

import pytest
import torch

from methods.policy_optimization.batch import (
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    row,
    synthetic_batch,
)
from tokenloom.methods.policy_optimization.ar_lopti import isolate, reweight


def test_defaults() -> None:
    assert defaults("ar-lopti/reweight") == {"alpha": 0.3}
    assert defaults("ar-lopti/isolate") == {"eta": 0.5, "epochs": 1, "mini_batches": 1}
    assert preset_defaults("ar-lopti") == {"use": "both", "alpha": None, "eta": None}
    assert make("ar-lopti", use="ar").credit[0].params == {"alpha": 0.2}
    assert make("ar-lopti", use="lopti").updates.params == {"eta": 0.4}
    assert make("ar-lopti").bounds.params == {"low": 0.2, "high": 0.24, "cap": 10.0}


def test_weights_worked_by_hand() -> None:
    # pi = 1, 1/2, 1/10: 0.3 pi + 0.7
    old = row(0.0, math.log(0.5), math.log(0.1))
    close(reweight(row(2.0, -2.0, 1.0), old, ones(1, 3)), row(2.0, -2 * 0.85, 0.73))
    close(reweight(row(2.0, -2.0, 1.0), old, ones(1, 3), alpha=0.0), row(2.0, -2.0, 1.0))


def test_weights_rise_with_probability_and_stay_in_range() -> None:
    old = torch.linspace(-30, 0, 50, dtype=torch.float64)[None]
    weights = reweight(torch.ones_like(old), old, ones(1, 50), alpha=0.6)[0]
    assert bool((weights.diff() >= 0).all())
    assert float(weights.min()) >= 0.4
    close(weights[-1], 1.0)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_impossible_strengths_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=str(alpha)):
        reweight(row(1.0), row(-1.0), ones(1), alpha=alpha)


def passes(eta: float, **rest: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rollouts, signals = synthetic_batch()
    assert signals.old_logprobs is not None
    keep = torch.ones(len(rollouts), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    made = isolate(rollouts.group_ids, keep, signals.old_logprobs, rollouts.mask, generator, eta=eta, **rest)
    return made["rows"], made["tokens"]


def test_the_two_passes_partition_the_mask_unlikely_first() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.old_logprobs is not None
    rows, tokens = passes(0.3)
    assert len(rows) == 2
    assert torch.equal(tokens[0] | tokens[1], rollouts.mask)
    assert not bool((tokens[0] & tokens[1]).any())
    assert torch.equal(tokens[0], rollouts.mask & (signals.old_logprobs.exp() < 0.3))


def test_each_pass_has_all_its_epochs_and_mini_batches() -> None:
    rows, tokens = passes(0.3, epochs=2, mini_batches=3)
    unlikely = passes(0.3)[1][0]
    assert len(rows) == 12
    for i, (at, mask) in enumerate(zip(rows, tokens, strict=True)):
        # Not interleaved: the first six updates are the unlikely tokens', the last six the others'.
        assert torch.equal(mask, (unlikely if i < 6 else synthetic_batch()[0].mask & ~unlikely)[at])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_at_the_ends_it_is_a_single_ordinary_update(eta: float) -> None:
    rollouts, signals = synthetic_batch()
    rows, tokens = passes(eta)
    assert len(rows) == 1
    assert torch.equal(tokens[0], rollouts.mask)
    algorithm = make("ar-lopti", use="lopti", eta=eta)
    (update,) = algorithm.plan(rollouts, signals).updates
    (plain,) = algorithm.override(updates="mini-batches").plan(rollouts, signals).updates
    close(update.tensors["scale"], plain.tensors["scale"])
    # A token that is certain belongs to the only pass as well.
    certain = isolate(rollouts.group_ids, rollouts.mask.any(-1), torch.zeros_like(signals.old_logprobs),
                      rollouts.mask, torch.Generator(), eta=eta)  # fmt: skip
    assert torch.equal(certain["tokens"][0], rollouts.mask[certain["rows"][0]])


def test_a_pass_without_tokens_is_skipped() -> None:
    mask = ones(2, 2)
    made = isolate(torch.tensor([0, 0]), mask.any(-1), torch.full((2, 2), -5.0), mask, torch.Generator())
    assert len(made["rows"]) == 1
    assert torch.equal(made["tokens"][0], mask)


def test_other_tokens_count_in_the_normalizer_and_lose_their_kl() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("ar-lopti", use="lopti", eta=0.3)
    first, second = algorithm.plan(rollouts, signals).updates
    unlikely = passes(0.3)[1][0]
    count = int(rollouts.mask.sum())
    close(first.tensors["scale"], unlikely.double() / count)
    close(first.tensors["scale/0"], unlikely.double() / count)
    close(first.tensors["scale"] + second.tensors["scale"], rollouts.mask.double() / count)
    assert torch.equal(first.tensors["old_logprobs"], second.tensors["old_logprobs"])


def test_ar_scales_the_coefficients() -> None:
    rollouts, signals = synthetic_batch()
    assert signals.old_logprobs is not None
    ar = make("ar-lopti", use="ar").override(terms=None)
    base = ar.override(credit=None)
    weights = 0.2 * signals.old_logprobs.exp() + 0.8
    close(coefficients_of(ar, rollouts, signals), weights * coefficients_of(base, rollouts, signals))


@pytest.mark.parametrize("size", [2, 3, 10, 500])
def test_why_unlikely_tokens_pull_hardest(size: int) -> None:
    logits = 3 * torch.randn(200, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    law = logits.softmax(-1)
    tokens = torch.multinomial(law, 1, generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.log_softmax(leaf, -1).gather(-1, tokens).sum(), leaf)
    norm, rest = grad.norm(dim=-1), 1 - law.gather(-1, tokens)[:, 0]
    assert bool((norm <= math.sqrt(2) * rest + 1e-9).all())
    assert bool((norm >= math.sqrt(size / (size - 1)) * rest - 1e-9).all())
